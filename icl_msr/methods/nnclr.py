"""NNCLR: Dwibedi et al. With a Little Help from My Friends. ICCV 2021 (arXiv 2104.14548)."""

from collections.abc import Mapping, Sequence

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import nearest, neighbour_nce
from icl_msr.methods.base import Method, Pair, Step, Targets, crosswise
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Queue


class NNCLR(Method):
    """Contrasts the prediction of one view with the other view's nearest neighbour among earlier projections.

    Non-semantic negatives go through the online encoder and projector without gradient and repel the prediction (ours).
    """

    refuses: Mapping[str, str] = {
        "synthetic": "nnclr compares stored neighbours, which have no gradient, and neither has a synthetic negative, "
        "so that it would push nothing away; add hard_negatives=none or hcl, or choose another method.",
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        queue_size: PositiveInt,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim, norm_last=True))
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)
        self.support = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return predictions p1, p2, then the projections z1, z2 that they are computed from."""
        projections = self.projector(torch.cat(list(features)))
        return [*self.predictor(projections).chunk(2), *projections.chunk(2)]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the mean of L(NN(z1), p2) and L(NN(z2), p1) (eq. 3, algorithm 1)."""
        p_first, p_second, z_first, z_second = embeddings
        support = self.support.keys
        return (
            neighbour_nce(nearest(z_first, support), p_second, self.temperature, targets.negatives, self.hard(step))
            + neighbour_nce(nearest(z_second, support), p_first, self.temperature, targets.negatives, self.hard(step))
        ) / 2

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return the pairs of each view's prediction and the other's projection.

        This is ours: the loss uses the nearest neighbour of that projection, but no gradient would reach the strata
        through it.
        """
        return crosswise(embeddings[:2], embeddings[2:], features, self.projector)

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Add the first view's projections to the support set (algorithm 1)."""
        self.support.push(embeddings[2])
