"""Barlow Twins: Zbontar et al. Self-Supervised Learning via Redundancy Reduction. ICML 2021 (arXiv 2103.03230)."""

from collections.abc import Sequence

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.decorrelation import barlow_twins
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class BarlowTwins(Method):
    """Makes each dimension of the embedding agree between two views and be uncorrelated with the others.

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
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim))
        self.off_diagonal, self.scale = off_diagonal, scale

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the distance of the cross-correlation from the identity (eq. 1), over the images of all ranks."""
        first, second = embeddings
        repelled = (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2
        return self.scale * barlow_twins(first, second, self.off_diagonal) - repelled
