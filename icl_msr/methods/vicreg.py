"""VICReg: Bardes, Ponce and LeCun. Variance-Invariance-Covariance Regularization. ICLR 2022 (arXiv 2105.04906)."""

from collections.abc import Sequence

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.decorrelation import vicreg
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class VICReg(Method):
    """Attracts two views. A hinge on the variance and a penalty on the covariances keep the embedding from collapse.

    The projector is the paper's expander. Non-semantic negatives go through the encoder without gradient and are
    repelled from the projection (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        invariance: NonNegativeFloat,
        variance: NonNegativeFloat,
        covariance: NonNegativeFloat,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim))
        self.weights = (invariance, variance, covariance)

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the variance, invariance and covariance loss (eq. 6), over the images of all ranks."""
        first, second = embeddings
        repelled = (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2
        return vicreg(first, second, *self.weights) - repelled
