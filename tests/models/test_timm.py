"""Every family of timm as a backbone: the width, the maps and the sizes of all its kinds of networks."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from support.tiny import trained
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.models.backbones import Backbone, evaluating, timm_model

SMALL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", 64, {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}),
    "levit": ("levit_128s", 224, {}),
    "mixer": ("mixer_s32_224", 96, {}),
    "mobilenet_v3": ("mobilenetv3_small_050", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "pit": ("pit_ti_224", 64, {}),
    "registers": ("test_vit", 64, {"patch_size": 8, "reg_tokens": 3}),
}
"""Models with all kinds of features: a size in pixels, and options that make them small."""
UNMAPPED = ("mobilenet_v3", "ghostnet", "pit")
"""Those of `SMALL` without a map: with a layer behind the pooling, or with the class token as their only result."""
LARGE = 30e6
"""Number of parameters up to which the table trains a model."""


def make(name: str) -> tuple[Backbone, Tensor]:
    """Return a model of `SMALL` and two images for it."""
    torch.manual_seed(0)
    model, size, options = SMALL[name]
    return timm_model(size, name=model, options=options, weights=None).eval(), torch.randn(2, 3, size, size)


def random_images(size: int) -> Dataset:
    """Return a data set of four random images."""
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    split = ArraySplit(images, torch.arange(4) % 2)
    return Dataset("random", ("a", "b"), size, split, {"original": split})


def train(name: str, size: int, **options: Any) -> None:
    """Train a model for one step on two images, with the regularizer and its meta step."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    given = [f"+backbone.options.{key}={value}" for key, value in options.items()]
    words = ["backbone=timm", f"backbone.name={name}", *given, "regularizer=msr", "regularizer.every=1"]
    trained(*words, "loader.batch_size=2", data=random_images(size), limit_train_batches=1)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_the_width_is_that_of_the_features(name: str) -> None:
    backbone, images = make(name)
    assert backbone(images).shape == (2, backbone.channels)


@pytest.mark.parametrize("name", SMALL)
def test_maps_are_in_place(name: str) -> None:
    """A cell of the map depends most on the part of the image that it lies on."""
    backbone, images = make(name)
    if name in UNMAPPED:
        with pytest.raises(UserError, match="has no last feature map"):
            backbone.maps(images)
        return
    images.requires_grad_()
    maps = backbone.maps(images)
    assert maps.shape[:2] == (2, backbone.channels)
    side = maps.shape[2]
    assert maps.shape[3] == side > 1
    if name == "levit":  # its last attention has no residual, so a random one looks everywhere
        torch.testing.assert_close(maps.mean((2, 3)), backbone(images), rtol=1e-4, atol=1e-5)
        return
    for row, column in ((0, side - 1), (side - 1, 0), (side - 1, side - 1)):
        (gradient,) = torch.autograd.grad(maps[:, :, row, column].square().sum(), images, retain_graph=True)
        energy = gradient.square().sum((0, 1))
        cells = nn.functional.adaptive_avg_pool2d(energy[None, None], side)[0, 0]
        assert divmod(int(cells.argmax()), side) == (row, column)


@pytest.mark.parametrize("name", ["swin", "mixer", "mobilenet_v3", "registers"])
def test_they_are_trained_with_the_regularizer(name: str) -> None:
    model, size, options = SMALL[name]
    train(model, size, **options)


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("levit_128s", 32, r"levit_128s cannot take images of 32 pixels \(.+\); set dataset\.image_size=224\."),
        ("test_vit", 40, r"test_vit"),
        ("resnet18", 0, "resnet18 cannot take images of 0 pixels"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(name: str, size: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        timm_model(size, name=name, options={}, weights=None)
    assert "\n" not in str(refused.value)


def test_a_result_that_is_not_pooled_is_refused() -> None:
    with pytest.raises(UserError, match=r"test_resnet gives a result of shape \(2, 96, \d, \d\) for two images"):
        timm_model(64, name="test_resnet", options={"global_pool": ""}, weights=None)


class Keeping(nn.Linear):
    """Keeps its weights in evaluation mode until it is told to train, like LeViT of timm 1.0."""

    kept: Tensor | None = None

    def train(self, mode: bool = True) -> "Keeping":
        self.kept = None if mode else self.kept
        super().train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return super().forward(images)
        self.kept = self.weight.clone() if self.kept is None else self.kept
        return nn.functional.linear(images, self.kept, self.bias)


@torch.no_grad()
def test_evaluation_sees_the_weights_of_now() -> None:
    network, rows = Keeping(3, 2), torch.randn(4, 3)
    for _ in range(2):
        with evaluating(network):
            torch.testing.assert_close(network(rows), rows @ network.weight.T + network.bias)
        assert network.training
        network.weight.add_(1)


# All families


@contextmanager
def without_weights() -> Iterator[None]:
    """Build networks without memory for their weights."""
    with torch.device("meta"):
        yield


def parameters(name: str) -> float:
    """Return the number of parameters of a model of timm; infinity if it is not known."""
    try:
        with without_weights():
            return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
    except Exception:
        return math.inf


def smallest(family: str) -> str:
    """Return the variant of a family with the fewest parameters. A family is a module of timm."""
    return min(timm.list_models(module=family), key=parameters)


def outcome(name: str, size: int) -> tuple[int, str]:
    """Build a model, encode, look at its maps, train it if it is small; return its width and what happened."""
    try:
        backbone = timm_model(size, name=name, options={}, weights=None)
    except UserError as refused:
        return 0, f"refused: {refused}"
    images = torch.randn(2, 3, size, size)
    with torch.no_grad(), evaluating(backbone):
        assert backbone(images).shape == (2, backbone.channels)
        try:
            side = backbone.maps(images).shape[-1]
            told = [f"maps {side} x {side}"]
        except UserError:
            told = ["no maps"]
    if sum(p.numel() for p in backbone.parameters()) <= LARGE:
        train(name, size)
        told.append("trained")
    return backbone.channels, ", ".join(told)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in timm.list_modules() if timm.list_models(module=family)])
def test_every_family_runs_or_says_why_not(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = smallest(family)
    about = timm.get_pretrained_cfg(name)
    size, began = 224 if about is None else int(about.input_size[-1]), time.perf_counter()
    width, told = outcome(name, size)
    assert "\n" not in told
    with capsys.disabled():
        seconds = time.perf_counter() - began
        print(f"\n{family:20} {name:32} {size:4} px  width {width:5} {seconds:6.1f} s  {told}", end=" ")
