"""Random command lines and damaged files: whatever is typed or read ends in a result or in one sentence."""

KINDS = ("npz", "arrays", "safetensors", "png", "jpeg", "gif", "tiff", "webp", "coco", "captions", "config", "boxes")
"""Kinds of files that hold bytes or nested text of others; atheris changes them."""
