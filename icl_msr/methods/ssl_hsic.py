"""SSL-HSIC: Li et al. Self-Supervised Learning with Kernel Dependence Maximization. NeurIPS 2021 (arXiv 2106.08320)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.dependence import imq_frequencies, ssl_hsic
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Step, Targets, through
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Statistics


class SSLHSIC(Method):
    """Makes embeddings depend on the identity of their image and, by a penalty on their variance, on little else.

    An image has four embeddings: the predictions and the momentum projections of its two views (as in the official
    code; the networks are those of BYOL). The kernel's scale is set by a key (the official code adapts it during
    training). Non-semantic negatives are repelled from the prediction (ours).
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
        momentum: Momentum,
        momentum_statistics: Statistics,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics, rising=True)
        self.gamma, self.kernel_scale, self.frequencies = gamma, kernel_scale, random_features // 2

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return predictions of both views."""
        return through(lambda h: self.predictor(self.projector(h)), features)

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return -HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z)) over the images of all ranks (section 3)."""
        first, second = embeddings
        # Every step draws new kernel features from its index, so that they are the same on all ranks.
        draws = imq_frequencies(2 * self.frequencies, first.shape[1], self.kernel_scale, step.index).chunk(2)
        dependence = ssl_hsic(torch.stack([first, second, *targets.embeddings]), draws, self.gamma)
        return dependence - (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2
