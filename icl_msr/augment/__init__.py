"""Batched augmentation: one recipe per view, every sample with its own parameters, on the device of the images."""

from icl_msr.augment.geometry import resize
from icl_msr.augment.recipe import Augmentation, Recipe

__all__ = ["Augmentation", "Recipe", "resize"]
