"""VICReg: Bardes, Ponce and LeCun. Variance-Invariance-Covariance Regularization. ICLR 2022 (arXiv 2105.04906)."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.decorrelation import vicreg
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class VICReg(Method):
    """Two views attract each other; a hinge on the variance and the covariances keep the embedding from collapse.

    Non-semantic negatives go through the encoder without gradient and are repelled from the projection (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        invariance: NonNegativeFloat,
        variance: NonNegativeFloat,
        covariance: NonNegativeFloat,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim)
        self.weights = (invariance, variance, covariance)

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Projections (the paper's expander) of both views."""
        return list(self.projector(torch.cat(list(features))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Invariance, variance and covariance (eq. 6), over the images of all ranks."""
        first, second = embeddings
        repelled = (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2
        return vicreg(first, second, *self.weights) - repelled

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view against the other."""
        return [Pair(embeddings[i], embeddings[j], features[j], self.projector) for i, j in ((0, 1), (1, 0))]
