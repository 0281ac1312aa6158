"""Contrastive objectives as pure functions of tensors: no state, fp32 inside, means over anchors."""
