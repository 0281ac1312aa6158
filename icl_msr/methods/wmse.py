"""W-MSE: Ermolov et al. Whitening for Self-Supervised Representation Learning. ICML 2021 (arXiv 2007.06346)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from icl_msr.core.distributed import world_size
from icl_msr.core.errors import UserError
from icl_msr.core.views import Views
from icl_msr.losses.regression import repulsion
from icl_msr.losses.whitening import partition, wmse
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class WMSE(Method):
    """Two views attract each other after each view's batch has been whitened, which scatters it over the sphere.

    MSR and the repulsion of non-semantic negatives, which go through the encoder without gradient, see the projection
    before the whitening (ours): whitened, an embedding is no function of its image alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        whitening_size: PositiveInt,
        whitening_iterations: PositiveInt,
        shrinkage: Annotated[float, Field(ge=0, lt=1)],
    ):
        super().__init__()
        if whitening_size < 2 * embedding_dim:
            raise UserError(
                f"method.whitening_size={whitening_size} is too small to whiten {embedding_dim} dimensions; type "
                f"method.whitening_size={2 * embedding_dim} or more, or make method.embedding_dim smaller."
            )
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.size, self.iterations, self.shrinkage = whitening_size, whitening_iterations, shrinkage

    def require_batch(self, images: int) -> None:
        """A sub-batch is whitened together."""
        if images < self.size:
            raise UserError(
                f"method.whitening_size={self.size} is more than the {images} images of a batch; type "
                f"loader.batch_size={self.size} or more, or make method.whitening_size smaller."
            )

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Projections v of both views, not yet whitened."""
        return list(self.projector(torch.cat(list(features))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Mean squared error of normalised whitened embeddings, whitened in sub-batches of the images of all ranks."""
        first, second = embeddings
        images = len(first) * world_size()
        self.require_batch(images)
        parts = partition(images, self.size, self.iterations, step.index)
        repelled = (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2
        return wmse(first, second, parts, self.shrinkage) - repelled

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view against the other."""
        return [Pair(embeddings[i], embeddings[j], features[j], self.projector) for i, j in ((0, 1), (1, 0))]
