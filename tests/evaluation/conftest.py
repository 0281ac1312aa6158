"""A data set of flat images: the background's colour in the border, the object's colour in the middle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from icl_msr.data.dataset import ArraySplit, Dataset

CLASSES, SIZE = 4, 8


def paint(objects: Tensor, backgrounds: Tensor) -> Tensor:
    """uint8 (N, 3, S, S): a class is a grey level; -1 is black."""
    level = lambda label: ((label + 1) * 50).to(torch.uint8)  # noqa: E731
    images = level(backgrounds)[:, None, None, None].repeat(1, 3, SIZE, SIZE)
    images[:, :, 2:-2, 2:-2] = level(objects)[:, None, None, None]
    return images


@pytest.fixture
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(CLASSES, (count,), generator=generator)  # noqa: E731

    def split(labels: Tensor, objects: Tensor, backgrounds: Tensor) -> ArraySplit:
        return ArraySplit(paint(objects, backgrounds), labels)

    labels, other, nothing = draw(200), draw(200), torch.full((200,), -1)
    fitted, balanced = draw(400), draw(100)
    tests = {
        "original": split(labels, labels, labels),
        "mixed_same": split(labels, labels, labels),
        "mixed_rand": split(labels, labels, other),
        "only_fg": split(labels, labels, nothing),
        "only_bg": split(labels, nothing, labels),
    }
    return Dataset(
        name="flat",
        classes=[str(label) for label in range(CLASSES)],
        image_size=SIZE,
        train=split(fitted, fitted, fitted),
        tests=tests,
        balanced=split(balanced, balanced, draw(100)),
    )


class Crop(nn.Module):
    """An encoder that sees one pixel, through a BatchNorm and a dropout that must stay as they are."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Identity().eval()

    def forward(self, images: Tensor) -> Tensor:
        seen = self.norm(self.drop(images))[:, :, self.row, self.row]
        levels = torch.linspace(-2, 2, 24)
        return torch.exp(-4 * (seen.mean(1, keepdim=True) - levels).square())


@pytest.fixture
def background_encoder() -> nn.Module:
    return Crop(row=0)


@pytest.fixture
def object_encoder() -> nn.Module:
    return Crop(row=SIZE // 2)


@pytest.fixture
def blobs() -> Callable[..., tuple[Tensor, Tensor]]:
    """Overlapping, correlated, half-rectified clusters, like pooled features."""

    def make(count: int, seed: int, channels: int = 64, classes: int = 10) -> tuple[Tensor, Tensor]:
        shape, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        centres = 0.3 * torch.randn(classes, channels, generator=shape)
        mixing = torch.randn(channels, channels, generator=shape) / channels**0.5
        labels = torch.randint(classes, (count,), generator=generator)
        return (centres[labels] + torch.randn(count, channels, generator=generator) @ mixing).relu(), labels

    return make
