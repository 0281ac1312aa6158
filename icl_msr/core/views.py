"""What travels from the loader to a method."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

AlphaMode = Literal["exponent", "weight"]
AlphaSchedule = Literal["constant", "linear", "cosine"]


@dataclass
class NonSemantic:
    """Negatives that keep the texture of an image and drop its meaning; m an image, compared with that image only."""

    rows: Tensor
    """(N, m, C, h, w) images in `Views`; (N, m, D) their embeddings in `Targets`."""
    alpha: float
    """How much they count in InfoNCE-like losses; see `alpha_mode`."""
    repulsion: float
    """Weight alpha_r of the repulsion in losses without negatives."""
    alpha_mode: AlphaMode = "exponent"
    """What a negative t adds to its anchor's denominator: exp(alpha q.t / tau); `weight`: alpha exp(q.t / tau)."""
    alpha_schedule: AlphaSchedule = "constant"
    """How alpha and alpha_r get to their values: they have them, or rise from 0 over all of training."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Numbers () of the generator for the log, by name."""

    def at(self, progress: float) -> "NonSemantic":
        """These negatives with the alpha and alpha_r of the moment; `progress` through training is in [0, 1].

        With alpha 0 a negative repels nothing in either mode: inside the exponent it is a constant in the denominator.
        """
        share = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        factor = share[self.alpha_schedule]
        return replace(self, alpha=factor * self.alpha, repulsion=factor * self.repulsion, alpha_schedule="constant")


@dataclass
class Views:
    """One augmented batch. N images, V views, C channels, m negatives an image.

    All images are float and normalised with the data set's mean and standard deviation.
    """

    images: Tensor
    """(N, C, H, W) the un-augmented images X, which the meta semantic regularizer reads."""
    views: list[Tensor]
    """V tensors (N, C, h, w): independent augmentations X^1, X^2, ... of the same N images."""
    index: Tensor
    """(N,) int64 position of each image in the training split."""
    labels: Tensor
    """(N,) int64 class labels; online monitors and `supervised` read them, no other method does."""
    negatives: NonSemantic | None = None
    """Non-semantic negatives of each image, made from its first view."""
