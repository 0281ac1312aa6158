"""Augmentation of batches on the device of the images. Each view has a recipe, and each image its own parameters."""

from icl_msr.augment.background import Background
from icl_msr.augment.geometry import resize
from icl_msr.augment.recipe import Augmentation, Recipe

__all__ = ["Augmentation", "Background", "Recipe", "resize"]
