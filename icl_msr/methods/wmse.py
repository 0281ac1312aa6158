"""W-MSE: Ermolov et al. Whitening for Self-Supervised Representation Learning. ICML 2021 (arXiv 2007.06346)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.distributed import world_size
from icl_msr.core.errors import UserError
from icl_msr.losses.regression import repulsion
from icl_msr.losses.whitening import partition, wmse
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class WMSE(Method):
    """Attracts all views of an image after whitening the batch of each view, which scatters it over the sphere.

    W-MSE 2 has two views; `augment.views=[{},{},{},{}]` makes W-MSE 4.

    MSR uses the projection before the whitening (ours), because a whitened embedding depends on other images too.
    Non-semantic negatives go through the encoder without gradient and are repelled from the same projection (ours).
    """

    takes = (2, 16)

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
        if whitening_size < 2 * embedding_dim:
            raise UserError(
                f"method.whitening_size={whitening_size} is too small to whiten {embedding_dim} dimensions; type "
                f"method.whitening_size={2 * embedding_dim} or more, or make method.embedding_dim smaller."
            )
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.size, self.iterations, self.shrinkage = whitening_size, whitening_iterations, shrinkage

    @override
    def require_batch(self, images: int) -> None:
        if images < self.size:
            raise UserError(
                f"method.whitening_size={self.size} is more than the {images} images of a batch; type "
                f"loader.batch_size={self.size} or more, or make method.whitening_size smaller."
            )

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the mean squared error of all pairs of whitened views.

        Sub-batches are taken from the images of all ranks.
        """
        images = len(embeddings[0]) * world_size()
        self.require_batch(images)
        parts = partition(images, self.size, self.iterations, step.index)
        repelled = torch.stack([repulsion(view, targets.negatives) for view in embeddings]).mean()
        return wmse(torch.stack(list(embeddings)), parts, self.shrinkage) - repelled
