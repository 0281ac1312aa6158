"""Contrastive methods, one file each."""

from icl_msr.methods.barlow_twins import BarlowTwins
from icl_msr.methods.base import Method, Output, Pair, Step, Targets
from icl_msr.methods.byol import BYOL
from icl_msr.methods.cmc import CMC
from icl_msr.methods.dcl import DCL
from icl_msr.methods.debiased import Debiased
from icl_msr.methods.dino import DINO
from icl_msr.methods.lmcl import LMCL
from icl_msr.methods.moco import MoCo
from icl_msr.methods.moco_v3 import MoCoV3
from icl_msr.methods.nnclr import NNCLR
from icl_msr.methods.random import RandomEncoder
from icl_msr.methods.relic import ReLIC
from icl_msr.methods.ressl import ReSSL
from icl_msr.methods.simclr import SimCLR
from icl_msr.methods.simsiam import SimSiam
from icl_msr.methods.ssl_hsic import SSLHSIC
from icl_msr.methods.supcon import SupCon
from icl_msr.methods.supervised import Supervised
from icl_msr.methods.swav import SwAV
from icl_msr.methods.vicreg import VICReg
from icl_msr.methods.wmse import WMSE

__all__ = [
    "BYOL",
    "CMC",
    "DCL",
    "DINO",
    "LMCL",
    "NNCLR",
    "SSLHSIC",
    "WMSE",
    "BarlowTwins",
    "Debiased",
    "Method",
    "MoCo",
    "MoCoV3",
    "Output",
    "Pair",
    "RandomEncoder",
    "ReLIC",
    "ReSSL",
    "SimCLR",
    "SimSiam",
    "Step",
    "SupCon",
    "Supervised",
    "SwAV",
    "Targets",
    "VICReg",
]
