"""Contrastive losses as pure functions of tensors. They keep no state, compute in fp32 and average over anchors."""
