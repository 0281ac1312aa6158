"""Backbones, heads, BatchNorm over ranks, foreign weights, exported encoders."""
