"""The batch that the data module passes to a method."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from icl_msr.core.errors import UserError

AlphaMode = Literal["exponent", "weight"]
AlphaSchedule = Literal["constant", "linear", "cosine"]


@dataclass
class NonSemantic:
    """Negatives that keep the texture of an image but not its meaning: m for each image, compared with it only."""

    rows: Tensor
    """(N, m, C, h, w) images in `Views`, or (N, m, D) embeddings of them in `Targets`."""
    alpha: float
    """Weight alpha in InfoNCE-like losses; see `alpha_mode`."""
    repulsion: float
    """Weight alpha_r of the repulsion, in losses without negatives."""
    alpha_mode: AlphaMode = "exponent"
    """Term that a negative t adds to its anchor's denominator: exp(alpha q.t / tau); `weight`: alpha exp(q.t / tau)."""
    alpha_schedule: AlphaSchedule = "constant"
    """Schedule of alpha and alpha_r: constant, or rising from 0 to their values over the whole training."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Scalars () that the generator logs, by name."""

    def at(self, progress: float) -> "NonSemantic":
        """Return these negatives with the alpha and alpha_r that hold at `progress` in [0, 1] through training.

        With alpha 0 a negative repels nothing in either mode: inside the exponent it only adds a constant to the
        denominator.
        """
        share = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        factor = share[self.alpha_schedule]
        return replace(self, alpha=factor * self.alpha, repulsion=factor * self.repulsion, alpha_schedule="constant")


@dataclass
class Views:
    """An augmented batch of N images with V views, C channels and m negatives per image.

    All images are float and normalised with the data set's mean and standard deviation.
    """

    whole: Tensor | None
    """The un-augmented `images`, or None if the data module leaves them out."""
    views: list[Tensor]
    """V tensors (N, C, h, w): independent augmentations X^1, X^2, ... of the same N images."""
    index: Tensor
    """(N,) int64 position of each image in the training split."""
    labels: Tensor
    """(N,) int64 class labels, read only by online monitors and by the methods `supervised` and `supcon`."""
    negatives: NonSemantic | None = None
    """Non-semantic negatives of each image, made from its first view."""

    @property
    def images(self) -> Tensor:
        """(N, C, H, W) the un-augmented images X, which the meta semantic regularizer reads.

        Raises:
            UserError: the data module leaves them out.
        """
        if self.whole is None:
            raise UserError(
                "Batches of photographs hold the un-augmented images only if a regularizer is chosen; "
                "set loader.whole_images=true."
            )
        return self.whole
