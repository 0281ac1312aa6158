"""What travels from the loader to a method."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class NonSemantic:
    """Negatives that keep the texture of an image and drop its meaning; m an image, compared with that image only."""

    rows: Tensor
    """(N, m, C, h, w) images in `Views`; (N, m, D) their embeddings in `Targets`."""
    alpha: float
    """Factor on their similarity inside the exponent of InfoNCE-like losses."""
    repulsion: float
    """Weight alpha_r of the repulsion in losses without negatives."""


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
