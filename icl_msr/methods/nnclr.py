"""NNCLR: Dwibedi et al. With a Little Help from My Friends. ICCV 2021 (arXiv 2104.14548)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import nearest, neighbour_nce
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Queue


class NNCLR(Method):
    """The nearest neighbour of one view, from a support set of earlier projections, meets the prediction of the other.

    Non-semantic negatives go through the online encoder and projector without gradient and repel the prediction (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        queue_size: PositiveInt,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim, norm_last=True)
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)
        self.queue = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Predictions p1, p2, then the projections z1, z2 that they come from."""
        projections = self.projector(torch.cat(list(features)))
        return [*self.predictor(projections).chunk(2), *projections.chunk(2)]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Mean of L(NN(z1), p2) and L(NN(z2), p1) (eq. 3, algorithm 1)."""
        p_first, p_second, z_first, z_second = embeddings
        support = self.queue.keys
        return (
            neighbour_nce(nearest(z_first, support), p_second, self.temperature, targets.negatives)
            + neighbour_nce(nearest(z_second, support), p_first, self.temperature, targets.negatives)
        ) / 2

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view's prediction against the other's projection.

        Ours: the loss has that projection's neighbour in its place, through which no gradient reaches the strata.
        """
        return [Pair(embeddings[i], embeddings[2 + j], features[j], self.projector) for i, j in ((0, 1), (1, 0))]

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """The first view's projections enter the support set (algorithm 1)."""
        self.queue.push(embeddings[2])
