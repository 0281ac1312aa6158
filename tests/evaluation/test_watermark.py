"""The mark against a picture that Pillow draws, and encoders that see the mark, or that do not."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluation.watermark import STROKES, THICKNESS, Watermark, mark, marked

Make = Callable[..., Watermark]
SIZE = 16


@pytest.fixture
def make() -> Make:
    def build(**keys: Any) -> Watermark:
        standard: dict[str, Any] = {
            "knn": [],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-1],
            "probe_epochs": 30,
            "probe_batch_size": 64,
            "probe_held_out": 0.2,
            "bootstrap": 200,
            "untrained": True,
            "batch_size": 64,
            "opacity": 0.5,
            "height": 0.3,
            "images": 100,
            "split": None,
        }
        return Watermark(**(standard | keys))

    return build


def test_the_mark_against_pillow() -> None:
    """Strokes with round ends, drawn large and scaled down."""
    size, height, scale = 64, 0.3, 16
    large = size * scale
    sheet = Image.new("L", (large, large))
    pen = ImageDraw.Draw(sheet)
    width = THICKNESS * height * large
    for place, sign in enumerate(STROKES):
        for x0, y0, x1, y1 in sign:
            ends = [
                ((0.5 + (x + place - 1.5) * height) * large, (0.5 + (y - 0.5) * height) * large)
                for x, y in ((x0, y0), (x1, y1))
            ]
            pen.line(ends, fill=255, width=round(width))
            for x, y in ends:
                pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    drawn = np.asarray(sheet.resize((size, size), Image.Resampling.BOX)) / 255
    ours = mark(size, height).numpy()
    assert abs(ours - drawn).mean() < 0.01
    assert abs(ours - drawn).max() < 0.35  # where the edges of two strokes meet in one pixel
    assert 0.05 < ours.mean() < 0.2
    assert ours[:, :2].max() == 0


def test_the_opacity() -> None:
    dark = torch.full((1, 3, 64, 64), 50, dtype=torch.uint8)
    cover = mark(64, 0.3).expand(3, -1, -1)
    for opacity in (0.25, 1.0):
        shown = marked(dark, opacity, 0.3)[0]
        assert shown[cover == 1].allclose(torch.tensor(50 + 205 * opacity))
        assert shown[cover == 0].eq(50).all()


class Corner(nn.Module):
    """The colour of the upper left corner, where no mark is."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0]


class Brightness(nn.Module):
    """How bright an image is, in steps: the mark makes a dark image look like a light one."""

    def forward(self, images: Tensor) -> Tensor:
        levels = torch.linspace(-1.4, 1.4, 20)
        return torch.exp(-20 * (images.mean((1, 2, 3))[:, None] - levels).square())


@pytest.fixture
def greys() -> Dataset:
    labels = torch.arange(200) % 3
    noise = torch.randint(-4, 5, (200,), generator=torch.Generator().manual_seed(0))
    images = (100 + 12 * labels + noise)[:, None, None, None].repeat(1, 3, SIZE, SIZE).byte()
    split = ArraySplit(images, labels)
    return Dataset("greys", ["dark", "middle", "light"], SIZE, split, {"test": split})


def test_an_encoder_that_sees_the_mark(make: Make, greys: Dataset) -> None:
    evaluation = make(learning_rates=[1.0])
    results = evaluation(Brightness(), greys, device="cpu", seed=0, untrained_encoder=Corner())
    json.dumps(results.records.to_json(), allow_nan=False)
    accuracy = {(r.encoder, r.split): r.value for r in results.records.where("accuracy")}
    assert {r.name for r in results.records.where("accuracy")} == set(evaluation.names(greys))
    assert accuracy["untrained", "marked"] == accuracy["untrained", "clean"] > 0.9
    assert accuracy["trained", "clean"] > 0.9
    assert accuracy["trained", "marked"] < 0.6
    gaps = {r.encoder: r.value for r in results.records.where("gap")}
    assert gaps["trained"] == pytest.approx(
        100 * (accuracy["trained", "clean"] - accuracy["trained", "marked"]), abs=0.01
    )
    assert gaps["untrained"] == 0
    trained, untrained = results.records.where("watermark")
    assert trained.note == "light"
    assert trained.value > 15  # type: ignore[operator]
    assert untrained.value == 0
    taken = {part: results.predictions[f"trained/linear/train/{part}"] == 2 for part in ("clean", "marked")}
    expected = 100 * (taken["marked"][1::2].mean() - taken["clean"][1::2].mean())
    assert trained.value == pytest.approx(expected, abs=0.01)
