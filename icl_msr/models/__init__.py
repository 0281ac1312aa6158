"""Backbones, heads, BatchNorm over all ranks, encoders of other libraries and exported encoders."""
