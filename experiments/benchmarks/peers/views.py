"""Two augmented views of images in memory.

torchvision v1 (on PIL) and v2, lightly, stable-pretraining and albumentations use two workers; kornia and ours use two
threads on whole batches. Jitter, crops, flips and blur have the same ranges everywhere.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from experiments.benchmarks.peers.rows import OURS, Calls, Row, Size, installed
from icl_msr.augment import Augmentation

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
JITTER = (0.4, 0.4, 0.4, 0.1)


class TwoViews(Dataset[Any]):
    """Images in memory with one transform that is called for each view."""

    def __init__(self, images: Sequence[Any], views: Callable[[Any], Any]):
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.views(self.images[i])


def through_workers(images: Sequence[Any], views: Callable[[Any], Any]) -> Callable[[], None]:
    """Return a call that goes once through the images with two workers, which are started before the first round."""
    loader = DataLoader(
        TwoViews(images, views), batch_size=32, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )

    def once() -> None:
        for _ in loader:
            pass

    return once


def rows(size: Size) -> list[Row]:
    """Return rows of two views at three sizes."""
    kinds = ((32, 32, 0.0), (96, 96, 0.5), (224, 400, 0.0), (224, 400, 0.5))
    found = []
    for side, source, blur in kinds[: size(4, 1)]:
        count = max(8, size(256, 8) * 32 // side)
        name = f"two views of {count} images, {side} px from {source}, blur {blur:g}"
        found.append(Row(name, partial(_views, count, source, side, blur), own_memory=False))
    return found


def _pixels(count: int, source: int) -> Tensor:
    noise = torch.rand(count, 3, source // 8, source // 8)
    smooth = nn.functional.interpolate(noise, size=(source, source), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8)


def _views(count: int, source: int, size: int, blur: float) -> Calls:
    pixels = _pixels(count, source)
    index = torch.arange(len(pixels))
    recipe: dict[str, Any] = {"scale": [0.2, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "bilinear", "flip": 0.5}
    recipe |= {"jitter": list(JITTER), "jitter_probability": 0.8, "gray": 0.2, "blur": blur, "sigma": [0.1, 2.0]}
    ours = Augmentation(**recipe, solarize=0.0, size=None, views=[{}, {}])
    work: Calls = {OURS: lambda: ours(pixels, index, seed=0, epoch=0, size=size, mean=MEAN, std=STD)}
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    kernel = size // 10 // 2 * 2 + 1

    def chain(kit: Any, *last: Any, **keys: Any) -> Any:
        parts = [kit.RandomResizedCrop(size, scale=(0.2, 1.0), **keys), kit.RandomHorizontalFlip()]
        parts += [kit.RandomApply([kit.ColorJitter(*JITTER)], p=0.8), kit.RandomGrayscale(0.2)]
        if blur:
            parts.append(kit.RandomApply([kit.GaussianBlur(kernel, (0.1, 2.0))], p=blur))
        return kit.Compose([*parts, *last, kit.Normalize(MEAN, STD)])

    first = chain(v1, v1.ToTensor())
    second = chain(v2, v2.ToDtype(torch.float32, scale=True), antialias=True)
    work["torchvision v1"] = through_workers(pictures, lambda x: (first(x), first(x)))
    work["torchvision v2"] = through_workers(list(pixels), lambda x: (second(x), second(x)))
    if installed("lightly"):
        from lightly.transforms.simclr_transform import SimCLRTransform

        keys: dict[str, Any] = {"cj_strength": 0.5, "min_scale": 0.2, "gaussian_blur": blur, "sigmas": (0.1, 2.0)}
        theirs = SimCLRTransform(input_size=size, random_gray_scale=0.2, **keys)
        work["lightly"] = through_workers(pictures, theirs)
    if installed("stable_pretraining"):
        from stable_pretraining.data import transforms as stable

        steps = [stable.RGB(), stable.RandomResizedCrop((size, size), scale=(0.2, 1.0))]
        steps += [stable.RandomHorizontalFlip(p=0.5), stable.ColorJitter(*JITTER, p=0.8), stable.RandomGrayscale(p=0.2)]
        if blur:
            steps.append(stable.GaussianBlur(kernel, (0.1, 2.0), p=blur))
        once = stable.Compose(*steps, stable.ToImage(mean=MEAN, std=STD))
        both = stable.MultiViewTransform([once, once])
        work["stable-pretraining"] = through_workers(pictures, lambda x: both({"image": x}))
    if installed("albumentations"):
        import albumentations as album
        from albumentations.pytorch import ToTensorV2

        parts = [album.RandomResizedCrop((size, size), scale=(0.2, 1.0)), album.HorizontalFlip(p=0.5)]
        parts += [album.ColorJitter(*JITTER, p=0.8), album.ToGray(p=0.2)]
        if blur:
            parts.append(album.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=blur))
        whole = album.Compose([*parts, album.Normalize(MEAN, STD), ToTensorV2()])
        arrays = [np.asarray(picture) for picture in pictures]
        work["albumentations"] = through_workers(arrays, lambda x: [whole(image=x)["image"] for _ in range(2)])
    if installed("kornia"):
        import kornia.augmentation as kornia

        kinds = [kornia.RandomResizedCrop((size, size), scale=(0.2, 1.0)), kornia.RandomHorizontalFlip(p=0.5)]
        kinds += [kornia.ColorJitter(*JITTER, p=0.8), kornia.RandomGrayscale(p=0.2)]
        if blur:
            kinds.append(kornia.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur))
        batch = nn.Sequential(*kinds, kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
        work["kornia"] = lambda: [batch(part.float() / 255) for part in torch.split(pixels, 32) for _ in range(2)]
    return work
