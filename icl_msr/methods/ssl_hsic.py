"""SSL-HSIC: Li et al. Self-Supervised Learning with Kernel Dependence Maximization. NeurIPS 2021 (arXiv 2106.08320)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.dependence import imq_frequencies, ssl_hsic
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import MomentumEncoder, rising_momentum


class SSLHSIC(Method):
    """Embeddings depend on which image they come from, and on as little else as the weight of their variance allows.

    An image has four embeddings: the predictions and the momentum projections of its two views (as the official code;
    the networks are those of BYOL). The kernel's scale is a key (the official code adapts it while it trains).
    Non-semantic negatives are repelled from the prediction (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        gamma: NonNegativeFloat,
        kernel_scale: PositiveFloat,
        random_features: Annotated[int, Field(gt=0, multiple_of=2)],
        momentum: Annotated[float, Field(ge=0, le=1)],
        momentum_statistics: Literal["own", "online"],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum_statistics)
        self.gamma, self.kernel_scale, self.frequencies = gamma, kernel_scale, random_features // 2
        self.momentum = momentum

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Momentum projections of both views."""
        features = self.momentum_encoder.backbone(torch.cat(views.views))
        projections = self.momentum_encoder.projector(features)
        negatives = embed_negatives(views.negatives, self.momentum_encoder, self)
        return Targets(list(features.chunk(2)), list(projections.chunk(2)), negatives)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Predictions of both views."""
        return list(self.predictor(self.projector(torch.cat(list(features)))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """-HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z)) over the images of all ranks (section 3)."""
        first, second = embeddings
        # New features of the kernel at every step, the same on all ranks: so they come from the step's index.
        draws = imq_frequencies(2 * self.frequencies, first.shape[1], self.kernel_scale, step.index).chunk(2)
        dependence = ssl_hsic(torch.stack([first, second, *targets.embeddings]), draws, self.gamma)
        return dependence - (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view's prediction against the other's momentum projection."""
        head = self.momentum_encoder.projector
        return [Pair(embeddings[i], targets.embeddings[j], targets.features[j], head) for i, j in ((0, 1), (1, 0))]

    def advance(self, step: Step) -> None:
        """The momentum encoder follows, ever more slowly, as in BYOL."""
        momentum = rising_momentum(self.momentum, step.progress)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum)
