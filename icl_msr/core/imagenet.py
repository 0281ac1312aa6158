"""Constants of ImageNet (ILSVRC-2012)."""

IMAGENET_CLASSES = 1000

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Channel means, for values in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Channel standard deviations, for values in [0, 1]."""
