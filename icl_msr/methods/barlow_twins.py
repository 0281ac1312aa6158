"""Barlow Twins: Zbontar et al. Self-Supervised Learning via Redundancy Reduction. ICML 2021 (arXiv 2103.03230)."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.decorrelation import barlow_twins
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class BarlowTwins(Method):
    """Each dimension of the embedding agrees between two views and is uncorrelated with the others.

    Non-semantic negatives go through the encoder without gradient and are repelled from the projection (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        off_diagonal: NonNegativeFloat,
        scale: PositiveFloat,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim)
        self.off_diagonal, self.scale = off_diagonal, scale

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Projections of both views."""
        return list(self.projector(torch.cat(list(features))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Cross-correlation against the identity (eq. 1), over the images of all ranks."""
        first, second = embeddings
        repelled = (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2
        return self.scale * barlow_twins(first, second, self.off_diagonal) - repelled

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view against the other."""
        return [Pair(embeddings[i], embeddings[j], features[j], self.projector) for i, j in ((0, 1), (1, 0))]
