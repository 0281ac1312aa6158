"""MoCo v2: He et al. Momentum Contrast. CVPR 2020 (arXiv 1911.05722); Chen et al. 2020 (arXiv 2003.04297)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import info_nce
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import MomentumEncoder, Queue


class MoCo(Method):
    """A query finds its key among a queue of earlier keys, encoded by a momentum encoder.

    Non-semantic negatives go through the key encoder (Ge et al. 2021) and never enter the queue.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        batch_norm: bool,
        temperature: PositiveFloat,
        queue_size: PositiveInt,
        momentum: Annotated[float, Field(ge=0, le=1)],
        momentum_statistics: Literal["own", "online"],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim, norm=batch_norm)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum_statistics)
        self.queue = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature
        self.momentum = momentum

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Keys of the second view."""
        features = self.momentum_encoder.backbone(views.views[1])
        keys = self.momentum_encoder.projector(features)
        return Targets([features], [keys], embed_negatives(views.negatives, self.momentum_encoder, self))

    def encode(self, views: Views) -> list[Tensor]:
        """Features of the first view."""
        return [self.backbone(views.views[0])]

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Queries q."""
        return [self.projector(features[0])]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """InfoNCE over the queue (eq. 1)."""
        return info_nce(embeddings[0], targets.embeddings[0], self.queue.keys, self.temperature, targets.negatives)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """One direction: queries against keys."""
        head = self.momentum_encoder.projector
        return [Pair(embeddings[0], targets.embeddings[0], targets.features[0], head, self.queue.keys)]

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """The keys enter the queue after the loss, so that a positive is never among the negatives."""
        self.queue.push(targets.embeddings[0])

    def advance(self, step: Step) -> None:
        """The key encoder follows (eq. 2)."""
        self.momentum_encoder.follow(self.backbone, self.projector, self.momentum)
