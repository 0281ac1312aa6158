"""BYOL: Grill et al. Bootstrap Your Own Latent. NeurIPS 2020 (arXiv 2006.07733)."""

from collections.abc import Sequence

from pydantic import PositiveInt
from torch import Tensor

from icl_msr.losses.regression import repulsion, squared_distance
from icl_msr.methods.base import Method, Step, Targets, through
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Statistics


class BYOL(Method):
    """Predicts the momentum projection of one view from the other view, without negatives.

    The momentum encoder follows more and more slowly (section 3.2). Non-semantic negatives are repelled from the
    prediction (Ge et al. 2021; the formula is ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        momentum: Momentum,
        momentum_statistics: Statistics,
        batch_norm_per_view: bool,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.apart = batch_norm_per_view
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics, rising=True)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return predictions q(g(h)) of both views."""
        return through(lambda h: self.predictor(self.projector(h)), features, self.apart)

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the mean of both directions of 2 - 2 cos (eq. 2; the paper sums them)."""
        (first, second), (key_first, key_second) = embeddings, targets.embeddings
        attraction = squared_distance(first, key_second) + squared_distance(second, key_first)
        return (attraction - repulsion(first, targets.negatives) - repulsion(second, targets.negatives)) / 2
