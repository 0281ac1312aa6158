"""SimSiam: Chen and He. Exploring Simple Siamese Representation Learning. CVPR 2021 (arXiv 2011.10566)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from icl_msr.losses.regression import repulsion, squared_distance
from icl_msr.methods.base import Method, Pair, Step, Targets, crosswise
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class SimSiam(Method):
    """Predicts one view's projection, a constant, from the other view. There is no momentum encoder.

    Non-semantic negatives go through the encoder without gradient and are repelled from the prediction (ours).
    """

    def __init__(
        self, backbone: Backbone, *, hidden_dim: PositiveInt, embedding_dim: PositiveInt, bottleneck_dim: PositiveInt
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim, norm_last=True))
        self.predictor = mlp(embedding_dim, bottleneck_dim, embedding_dim)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return predictions p = h(z) of both views, then their projections z = f(x): [p1, p2, z1, z2]."""
        projections = self.projector(torch.cat(list(features)))
        return [*self.predictor(projections).chunk(2), *projections.chunk(2)]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the mean of both directions of 2 - 2 cos(p, z). This is 2 + 2 L of the paper (eq. 4; D = -cos)."""
        first, second, key_first, key_second = embeddings
        attraction = squared_distance(first, key_second.detach()) + squared_distance(second, key_first.detach())
        return (attraction - repulsion(first, targets.negatives) - repulsion(second, targets.negatives)) / 2

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return the pairs of each view's prediction and the other's projection. The keys have no gradient."""
        keys, key_features = ([side.detach() for side in sides] for sides in (embeddings[2:], features))
        return crosswise(embeddings[:2], keys, key_features, StopGradient(self.projector))


class StopGradient(nn.Module):
    """A head with constant parameters. The gradient passes to its input."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Return embeddings (., D) of features (., c)."""
        constants = {name: parameter.detach() for name, parameter in self.head.named_parameters()}
        embeddings: Tensor = functional_call(self.head, constants, features)
        return embeddings
