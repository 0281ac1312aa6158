"""ReLIC: Mitrovic et al. Representation Learning via Invariant Causal Mechanisms. ICLR 2021 (arXiv 2010.07922)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import in_batch_nce
from icl_msr.losses.penalties import invariance
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import MomentumEncoder, rising_momentum


class ReLIC(Method):
    """Each view finds the target of the other in the batch, and the two distributions over the batch agree.

    The projector is the paper's critic g. Ours: the target network has its own, which follows like the rest (as in
    BYOL); both directions are averaged; non-semantic negatives go through the target network and enter the
    discrimination alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        alpha: NonNegativeFloat,
        momentum: Annotated[float, Field(ge=0, le=1)],
        momentum_statistics: Literal["own", "online"],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum_statistics)
        self.temperature: float = temperature
        self.alpha = alpha
        self.momentum = momentum

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Momentum projections of both views."""
        features = self.momentum_encoder.backbone(torch.cat(views.views))
        projections = self.momentum_encoder.projector(features)
        negatives = embed_negatives(views.negatives, self.momentum_encoder, self)
        return Targets(list(features.chunk(2)), list(projections.chunk(2)), negatives)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """g(f(x)) of both views."""
        return list(self.projector(torch.cat(list(features))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Instance discrimination + alpha KL of the two distributions (section 3)."""
        (first, second), (key_first, key_second) = embeddings, targets.embeddings
        discrimination = (
            in_batch_nce(first, key_second, self.temperature, targets.negatives)
            + in_batch_nce(second, key_first, self.temperature, targets.negatives)
        ) / 2
        return discrimination + self.alpha * invariance(first, second, key_first, key_second, self.temperature)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view's projection against the other's momentum projection."""
        head = self.momentum_encoder.projector
        return [Pair(embeddings[i], targets.embeddings[j], targets.features[j], head) for i, j in ((0, 1), (1, 0))]

    def advance(self, step: Step) -> None:
        """The target network follows, ever more slowly."""
        momentum = rising_momentum(self.momentum, step.progress)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum)
