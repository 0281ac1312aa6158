"""Splits made from another split: some of its images, or changed ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icl_msr.augment import Augmentation
from icl_msr.data.dataset import Split
from icl_msr.evaluation.cache import split_identity

_CROPS = -4
"""The `epoch` of the hash that crops images for an evaluation; training epochs count from 0."""


@dataclass
class Some:
    """Some of the images of a split."""

    split: Split
    index: Tensor
    """(n,) int64 positions in `split`."""

    def __post_init__(self) -> None:
        self.labels = self.split.labels.cpu()[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: Tensor) -> Tensor:
        """Load uint8 images (n, 3, S, S) at positions `index` (n,)."""
        return self.split.load(self.index[index])

    def identity(self) -> str | None:
        """Return a text that is equal only for equal images; see `cache.Identified`."""
        known = split_identity(self.split)
        return None if known is None else f"{known} {self.index.tolist()}"


@dataclass
class Changed:
    """A split whose images are changed as they are loaded."""

    split: Split
    change: Callable[[Tensor, Tensor], Tensor]
    """A function of uint8 images (n, 3, S, S) and their positions (n,). It returns images with values from 0 to 255."""
    about: str
    """A text that is equal only for equal changes."""
    device: torch.device
    """The device on which images are changed."""

    def __post_init__(self) -> None:
        self.labels = self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def load(self, index: Tensor) -> Tensor:
        """Load uint8 images (n, 3, S, S) at positions `index` (n,), on `device`."""
        images = self.split.load(index).to(self.device)
        return self.change(images, index.to(self.device)).round().clamp(0, 255).byte()

    def identity(self) -> str | None:
        """Return a text that is equal only for equal images; see `cache.Identified`."""
        known = split_identity(self.split)
        return None if known is None else f"{known} {self.about}"


def crops(split: Split, view: int, seed: int, device: torch.device) -> Changed:
    """Return a split of random crops, a quarter of the area or more, resized to the image size; half are mirrored.

    `view` is 0 or 1, for two different crops of each image.
    """
    augmentation = crop_and_flip([0.25, 1.0], 0.5, views=2)
    mean, std = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)

    def crop(images: Tensor, index: Tensor) -> Tensor:
        views = augmentation(images, index, seed=seed, epoch=_CROPS, size=images.shape[-1], mean=mean, std=std)
        return views[view]

    return Changed(split, crop, f"crop {view} {seed}", device)


def crop_and_flip(scale: list[float], flip: float, views: int = 1) -> Augmentation:
    """Return an augmentation that only crops, to `scale` (smallest, largest part of the area), and mirrors."""
    return Augmentation(
        scale=scale,
        ratio=[3 / 4, 4 / 3],
        interpolation="bilinear",
        flip=flip,
        jitter=[0.0, 0.0, 0.0, 0.0],
        jitter_probability=0.0,
        gray=0.0,
        blur=0.0,
        sigma=[1.0, 1.0],
        solarize=0.0,
        size=None,
        views=[{} for _ in range(views)],
    )
