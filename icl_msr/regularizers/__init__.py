"""Regularizers for any contrastive method."""

from icl_msr.regularizers.base import Pass, Regularizer
from icl_msr.regularizers.bilevel import ordinary_gradient
from icl_msr.regularizers.ifm import ImplicitFeatureModification
from icl_msr.regularizers.msr import MetaSemanticRegularizer

__all__ = ["ImplicitFeatureModification", "MetaSemanticRegularizer", "Pass", "Regularizer", "ordinary_gradient"]
