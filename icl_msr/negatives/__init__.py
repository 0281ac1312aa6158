"""Non-semantic negatives: pictures with the texture of an image and without its content."""

from icl_msr.negatives.cached import CachedNegatives
from icl_msr.negatives.patch import PatchNegatives
from icl_msr.negatives.phase import PhaseNegatives
from icl_msr.negatives.texture import TextureNegatives

__all__ = ["CachedNegatives", "PatchNegatives", "PhaseNegatives", "TextureNegatives"]
