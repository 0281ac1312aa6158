"""One file per contrastive method."""

from icl_msr.methods.base import Method, Output, Pair, Step, Targets
from icl_msr.methods.byol import BYOL
from icl_msr.methods.moco import MoCo
from icl_msr.methods.simclr import SimCLR

__all__ = ["BYOL", "Method", "MoCo", "Output", "Pair", "SimCLR", "Step", "Targets"]
