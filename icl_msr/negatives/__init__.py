"""Non-semantic negatives: pictures with the texture of an image and without its content."""

from icl_msr.negatives.patch import PatchNegatives

__all__ = ["PatchNegatives"]
