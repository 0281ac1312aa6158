"""Constants of ImageNet (ILSVRC-2012)."""

IMAGENET_CLASSES = 1000

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the channels, of values in [0, 1]."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the channels, of values in [0, 1]."""
