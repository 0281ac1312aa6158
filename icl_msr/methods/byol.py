"""BYOL: Grill et al. Bootstrap Your Own Latent. NeurIPS 2020 (arXiv 2006.07733)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.regression import repulsion, squared_distance
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import MomentumEncoder, rising_momentum


class BYOL(Method):
    """A predictor on one view meets the momentum projection of the other; there are no negatives.

    Non-semantic negatives are repelled from the prediction (Ge et al. 2021; formula ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        momentum: Annotated[float, Field(ge=0, le=1)],
        momentum_statistics: Literal["own", "online"],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum_statistics)
        self.momentum = momentum

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Momentum projections of both views."""
        features = self.momentum_encoder.backbone(torch.cat(views.views))
        projections = self.momentum_encoder.projector(features)
        negatives = embed_negatives(views.negatives, self.momentum_encoder, self)
        return Targets(list(features.chunk(2)), list(projections.chunk(2)), negatives)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Predictions p = q(g(h)) of both views."""
        return list(self.predictor(self.projector(torch.cat(list(features)))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Mean of both directions of 2 - 2 cos (eq. 2; the paper sums them)."""
        (first, second), (key_first, key_second) = embeddings, targets.embeddings
        attraction = squared_distance(first, key_second) + squared_distance(second, key_first)
        return (attraction - repulsion(first, targets.negatives) - repulsion(second, targets.negatives)) / 2

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view's prediction against the other's momentum projection."""
        head = self.momentum_encoder.projector
        return [Pair(embeddings[i], targets.embeddings[j], targets.features[j], head) for i, j in ((0, 1), (1, 0))]

    def advance(self, step: Step) -> None:
        """The momentum encoder follows, ever more slowly (section 3.2)."""
        momentum = rising_momentum(self.momentum, step.progress)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum)
