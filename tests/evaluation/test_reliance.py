"""Suppression of cues against loops and torchvision, and encoders that see the colour, or the place, alone."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as torchvision

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.reliance import (
    Reliance,
    bilateral,
    blurred,
    gray,
    outlined,
    rotated,
    shuffled,
    shuffled_channels,
    silhouettes,
)

SIZE = 16
Make = Callable[..., Reliance]
IMAGES = torch.randint(256, (6, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).float()
INDEX = torch.arange(6)


@pytest.fixture
def make() -> Make:
    def build(**keys: Any) -> Reliance:
        standard: dict[str, Any] = {
            "knn": [],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-1],
            "probe_epochs": 20,
            "probe_batch_size": 64,
            "probe_held_out": 0.2,
            "bootstrap": 200,
            "untrained": True,
            "batch_size": 64,
            "shuffled": [2, 8],
            "rotated": [2, 8],
            "blur": [1.0],
            "bilateral": [[5, 80]],
            "images": 100,
            "split": None,
        }
        return Reliance(**(standard | keys))

    return build


def tiles(image: Tensor, grid: int) -> list[Tensor]:
    return [part for row in image.chunk(grid, 1) for part in row.chunk(grid, 2)]


@pytest.mark.parametrize("grid", [2, 4, 16])
def test_tiles_are_put_in_another_order(grid: int) -> None:
    found = shuffled(IMAGES, INDEX, grid, seed=0)
    orders = []
    for before, after in zip(IMAGES, found, strict=True):
        old, new = tiles(before, grid), tiles(after, grid)
        orders.append([next(i for i, tile in enumerate(old) if tile.equal(part)) for part in new])
    assert len(set(map(tuple, orders))) > 1
    assert grid == 16 or all(sorted(order) == list(range(grid**2)) for order in orders)
    assert shuffled(IMAGES[2:4], INDEX[2:4], grid, seed=0).equal(found[2:4])
    assert not shuffled(IMAGES, INDEX, grid, seed=1).equal(found)


def test_tiles_are_turned() -> None:
    turns = []
    images = IMAGES.repeat(50, 1, 1, 1)
    for before, after in zip(images, rotated(images, torch.arange(300), 4, seed=0), strict=True):
        for old, new in zip(tiles(before, 4), tiles(after, 4), strict=True):
            turns.append(next(k for k in range(4) if torch.from_numpy(np.rot90(old, k, (1, 2)).copy()).equal(new)))
    assert np.bincount(turns) / len(turns) == pytest.approx([0.25] * 4, abs=0.02)


def test_a_grid_that_does_not_divide_the_image() -> None:
    flat = torch.full((2, 3, SIZE, SIZE), 77.0)
    for change in (shuffled, rotated):
        assert change(flat, INDEX[:2], 6, seed=0).allclose(flat, atol=1e-3)
        assert change(IMAGES, INDEX, 6, seed=0).shape == IMAGES.shape


def test_blur_and_gray_against_torchvision() -> None:
    expected = torchvision.gaussian_blur(IMAGES, [15, 15], [1.0, 1.0])
    inside = (slice(None), slice(None), slice(5, -5), slice(5, -5))  # torchvision mirrors without the border pixel
    assert blurred(IMAGES, INDEX, 1.0)[inside].allclose(expected[inside], atol=0.01)
    assert gray(IMAGES, INDEX).allclose(torchvision.rgb_to_grayscale(IMAGES, 3), atol=0.1)


def test_bilateral_against_loops() -> None:
    image, radius, colours, space = IMAGES[0, :, :6, :6] / 3, 2, 40.0, 3.0
    expected = torch.zeros_like(image)
    mirrored = [2, 1, *range(6), 4, 3]
    for y in range(6):
        for x in range(6):
            total, weights = torch.zeros(3), 0.0
            for down in range(-radius, radius + 1):
                for across in range(-radius, radius + 1):
                    if math.hypot(down, across) > radius:
                        continue
                    other = image[:, mirrored[y + down + 2], mirrored[x + across + 2]]
                    apart = float((other - image[:, y, x]).abs().sum())
                    weight = math.exp(-((down**2 + across**2) / (2 * space**2)) - apart**2 / (2 * colours**2))
                    total += weight * other
                    weights += weight
            expected[:, y, x] = total / weights
    assert bilateral(image[None], INDEX[:1], 5, colours, space)[0].allclose(expected, atol=1e-3)


def test_channels_never_stay_in_place() -> None:
    index = torch.arange(300)
    images = IMAGES[:1].expand(300, -1, -1, -1)
    orders = [
        tuple(next(k for k in range(3) if channel.equal(IMAGES[0, k])) for channel in image)
        for image in shuffled_channels(images, index, seed=0)
    ]
    assert len(set(orders)) == 5
    assert (0, 1, 2) not in orders


def painted(k: int, i: int) -> tuple[Tensor, Tensor]:
    """A red or blue image with a white bar, across its upper half or down its left half, and the mask of the bar."""
    image, mask = torch.full((3, SIZE, SIZE), 60), torch.zeros(SIZE, SIZE, dtype=torch.bool)
    image[0 if k < 2 else 2] += 120
    place = slice(1 + i % 3, 4 + i % 3)
    mask[place if k % 2 else slice(1, 15), slice(1, 15) if k % 2 else place] = True
    image[:, mask] = 250
    return image.byte(), mask


@pytest.fixture
def bars() -> Dataset:
    labels = torch.arange(200) % 4
    images, masks = (
        torch.stack(part) for part in zip(*(painted(int(k), i) for i, k in enumerate(labels)), strict=True)
    )
    masks[0, 0, 0] = True  # one mask that is not a mere box
    split = ArraySplit(images, labels, masks)
    return Dataset("bars", ["red down", "red across", "blue down", "blue across"], SIZE, split, {"test": split})


class Colour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        red, _, blue = images.mean((2, 3)).unbind(1)
        return torch.stack([red > blue, red < blue], 1).float()


class Place(nn.Module):
    """How bright the upper and the left half are, whatever the colour."""

    def forward(self, images: Tensor) -> Tensor:
        bright = (images.amin(1) > 1.5).float()
        return torch.stack([bright[:, : SIZE // 2].mean((1, 2)), bright[:, :, : SIZE // 2].mean((1, 2))], 1)


def relative(results: Any, **known: Any) -> dict[str, Any]:
    return {r.told("cue"): r for r in results.records.where("reliance", metric="relative", **known)}


def test_encoders_that_see_one_cue_alone(make: Make, bars: Dataset) -> None:
    evaluation = make()
    results = evaluation(Colour(), bars, device="cpu", seed=0, untrained_encoder=Place())
    json.dumps(results.records.to_json(), allow_nan=False)
    kinds = ("accuracy", "reliance")
    assert set(evaluation.names(bars)) == {
        r.name for r in results.records.findings() if r.kind in kinds and (r.kind, r.metric) != ("reliance", "accuracy")
    }
    assert results.records.find("accuracy", split="clean").value == pytest.approx(0.5)  # type: ignore[union-attr]
    colour, place = (relative(results, encoder=one) for one in ("trained", "untrained"))
    assert list(colour) == ["global shape", "local shape", "texture", "colour", "everything but the outline"]
    for cue in ("global shape", "local shape", "texture"):
        assert colour[cue].value == pytest.approx(1)
    assert colour["colour"].value < 0.85
    assert place["global shape"].value < 0.9
    assert place["colour"].value > colour["colour"].value + 0.1
    assert place["everything but the outline"].value < 0.8  # a black object is not bright
    assert all(r.n == 100 for r in colour.values())


def test_a_cue_is_the_mean_of_its_suppressions(make: Make, bars: Dataset) -> None:
    results = make()(Place(), bars, device="cpu", seed=0)
    clean = results.records.find("accuracy", split="clean").value  # type: ignore[union-attr]
    for cue, record in relative(results, encoder="trained").items():
        parts = results.records.where("suppression", metric="accuracy", cue=cue)
        assert record.value == pytest.approx(sum(part.value for part in parts) / len(parts) / clean)


def test_the_interval_of_a_ratio_against_numpy() -> None:
    random = np.random.default_rng(0)
    second = random.random(400) < 0.7
    first = second & (random.random(400) < 0.6)
    found = Bootstrap(4000, 0).ratio(torch.from_numpy(first), torch.from_numpy(second))
    drawn = random.integers(0, 400, (4000, 400))
    expected = np.quantile(first[drawn].mean(1) / second[drawn].mean(1), [0.025, 0.975])
    assert found.value == pytest.approx(first.mean() / second.mean())
    assert (found.low, found.high) == pytest.approx(expected, abs=0.01)


def test_silhouettes_need_outlines(make: Make, bars: Dataset) -> None:
    split = bars.tests["test"]
    assert isinstance(split, ArraySplit)
    assert split.masks is not None
    shown = silhouettes(split.images.float()[:3], INDEX[:3], split)
    assert shown[split.masks[:3, None].expand_as(shown)].eq(0).all()
    assert shown[~split.masks[:3, None].expand_as(shown)].eq(255).all()
    assert outlined(split)
    split.masks[0, 0, 0] = False
    assert not outlined(split)
    split.masks = None
    assert not outlined(split)
    assert not any("outline" in name for name in make().names(bars))


def test_mistakes(make: Make, bars: Dataset) -> None:
    with pytest.raises(UserError, match="A grid of 32 x 32 tiles needs images of 32 pixels or more, and they have 16"):
        make(rotated=[32]).names(bars)
