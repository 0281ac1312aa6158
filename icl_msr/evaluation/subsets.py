"""Splits made from another split: some of its images, or crops of them."""

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
class Crops:
    """A random crop of each image, a quarter of its area or more, resized to its size; half of them are mirrored."""

    split: Split
    view: int
    """0 or 1, for two different crops of each image."""
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.labels = self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def load(self, index: Tensor) -> Tensor:
        """Load uint8 crops (n, 3, S, S) of the images at positions `index` (n,), on `device`."""
        images = self.split.load(index).to(self.device)
        views = crop_and_flip([0.25, 1.0], 0.5, views=2)(
            images,
            index.to(self.device),
            seed=self.seed,
            epoch=_CROPS,
            size=images.shape[-1],
            mean=(0.0, 0.0, 0.0),
            std=(1 / 255, 1 / 255, 1 / 255),
        )
        return views[self.view].round().clamp(0, 255).byte()

    def identity(self) -> str | None:
        """Return a text that is equal only for equal images; see `cache.Identified`."""
        known = split_identity(self.split)
        return None if known is None else f"{known} crop {self.view} {self.seed}"


def crop_and_flip(scale: list[float], flip: float, views: int = 1) -> Augmentation:
    """Return an augmentation that only crops, to `scale` (smallest, largest part of the area), and mirrors."""
    return Augmentation(
        scale=scale,
        ratio=[3 / 4, 4 / 3],
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
