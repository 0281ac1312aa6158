"""Class activation maps against a singular value decomposition and automatic differentiation, and the pointing game."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.written import Page
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.core.figures import Overlays
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluate import main
from icl_msr.evaluation.attention import EIGEN, GRAD, Attention, eigen_cam, grad_cam, look
from icl_msr.evaluation.linear import fit_linear_probe
from icl_msr.models.backbones import Backbone, tiny
from icl_msr.report.__main__ import main as report

SIZE = 16
Make = Callable[..., Attention]


@pytest.fixture
def make() -> Make:
    def build(**keys: Any) -> Attention:
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
            "batch_size": 32,
            "split": None,
            "images": 60,
            "pictured": 4,
        }
        return Attention(**(standard | keys))

    return build


def test_eigen_cam_against_numpy() -> None:
    maps = torch.rand(5, 12, 4, 3, generator=torch.Generator().manual_seed(0))
    for found, own in zip(eigen_cam(maps), maps, strict=True):
        places = own.flatten(1).T.double().numpy()
        _, _, directions = np.linalg.svd(places, full_matrices=False)
        projected = places @ directions[0]
        expected = (projected * np.sign(projected.sum())).clip(0).reshape(4, 3)
        assert found.numpy() == pytest.approx(expected, abs=1e-4)


def test_grad_cam_against_automatic_differentiation() -> None:
    """The published rule: weigh each map by the mean over places of the gradient of the class score."""
    torch.manual_seed(0)
    backbone, labels = tiny(32, weights=None).eval(), torch.arange(40) % 4
    images = torch.randn(40, 3, 32, 32)
    probe = fit_linear_probe(
        backbone(images).detach(), labels, 4, learning_rates=[0.1], epochs=3, batch_size=8, held_out=0.2, seed=0
    )
    maps = backbone.maps(images).detach().requires_grad_()
    score = probe(maps.mean((2, 3))).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, maps)
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * maps).sum(1).clamp(min=0).detach() * 16  # 4 x 4 places
    slopes = (probe.weight[:-1] / probe.scale[:, None]).T[labels]
    torch.testing.assert_close(grad_cam(maps.detach(), slopes), expected, rtol=1e-3, atol=1e-5)


def test_the_share_and_the_pointing_game() -> None:
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = masks[1, 4:, 4:] = masks[2, :4] = True
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 1], maps[0, 3, 3] = 3, 1  # three quarters on the object, and the largest value there
    maps[1, 0, 0], maps[1, 3, 3] = 3, 1
    seen = look(maps, masks)
    assert seen.share[:2].tolist() == [0.75, 0.25]
    assert seen.pointing[:2].tolist() == [1, 0]
    assert seen.share_elsewhere[:2].tolist() == [0.25, 0.75 - 0.25]  # of the next image, corrected by the area
    assert seen.pointing_elsewhere[:2].tolist() == [0, 1 - 0.25]
    assert seen.share[2].isnan()
    assert seen.pointing[2].isnan()
    flat = look(torch.ones(3, 4, 4), masks)
    assert flat.share.tolist() == flat.share_elsewhere.tolist() == [0.25, 0.25, 0.5]


def blob(k: int, row: int, column: int) -> tuple[Tensor, Tensor]:
    """A red or green square on blue stripes, and its mask."""
    image, mask = torch.zeros(3, SIZE, SIZE), torch.zeros(SIZE, SIZE, dtype=torch.bool)
    image[2, ::2] = 200
    mask[row : row + 6, column : column + 6] = True
    image[:, mask] = 0
    image[k, mask] = 220
    return image.byte(), mask


@pytest.fixture
def blobs() -> Dataset:
    random = np.random.default_rng(0)
    labels = torch.arange(120) % 2
    drawn = [blob(int(k), *map(int, random.integers(0, 11, 2))) for k in labels]
    images, masks = (torch.stack(part) for part in zip(*drawn, strict=True))
    split = ArraySplit(images, labels, masks)
    return Dataset("blobs", ["red", "green"], SIZE, split, {"test": split}, mean=(0.0,) * 3, std=(1.0,) * 3)


def looking(weights: Any) -> Backbone:
    """An encoder of colours: channels are weighted sums of red, green and blue, pooled over 4 x 4 cells, then all."""
    mix = nn.Conv2d(3, len(weights), 1, bias=False)
    mix.weight.data = torch.tensor(weights)[:, :, None, None]
    return Backbone(nn.Sequential(mix, nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()), len(weights))


def found(results: Any, kind: str, encoder: str = "trained") -> dict[str, float]:
    return {r.metric: r.value for r in results.records.where("attention", map=kind, encoder=encoder)}


def test_encoders_that_see_the_object_or_the_background(make: Make, blobs: Dataset) -> None:
    evaluation = make()
    seeing, blind = looking([[1.0, 0, 0], [0, 1.0, 0]]), looking([[0, 0, 1.0], [0, 0, 2.0]])
    results = evaluation(seeing, blobs, device="cpu", seed=0, untrained_encoder=blind)
    json.dumps(results.records.to_json(), allow_nan=False)
    assert set(evaluation.names(blobs)) <= {record.name for record in results.records.findings()}
    for kind in (EIGEN, GRAD):
        own = found(results, kind)
        assert own["share"] > 0.6  # cells are larger than pixels
        assert own["pointing"] == 1
        assert own["share_elsewhere"] < 0.4
    area = float(blobs.tests["test"].masks.float().mean())  # type: ignore[attr-defined]
    away = found(results, EIGEN, "untrained")
    assert away["share"] < area
    assert away["pointing"] == 0
    assert results.records.find("accuracy", split="test", encoder="trained").value == 1  # type: ignore[union-attr]
    assert results.overlays
    assert results.overlays.images.shape == (4, SIZE, SIZE, 3)
    assert {kind: list(maps) for kind, maps in results.overlays.maps.items()} == {
        EIGEN: ["trained", "untrained"],
        GRAD: ["trained", "untrained"],
    }
    assert all(maps.max() <= 1 for by in results.overlays.maps.values() for maps in by.values())


def test_no_grad_cam_without_mean_pooling_or_classes(make: Make, blobs: Dataset) -> None:
    mix = looking([[1.0, 0, 0], [0, 1.0, 0]]).net[0]
    largest = Backbone(nn.Sequential(mix, nn.AvgPool2d(4), nn.AdaptiveMaxPool2d(1), nn.Flatten()), 2)
    largest._last_map = lambda images: largest.net[:2](images)  # type: ignore[method-assign, index]
    assert set(make()(largest, blobs, device="cpu", seed=0).overlays.maps) == {EIGEN}  # type: ignore[union-attr]
    blobs.classes = []
    blobs.train.labels.fill_(-1)
    results = make()(looking([[1.0, 0, 0], [0, 1.0, 0]]), blobs, device="cpu", seed=0)
    assert set(results.overlays.maps) == {EIGEN}  # type: ignore[union-attr]
    assert not results.records.where("accuracy")


def test_mistakes(make: Make, blobs: Dataset) -> None:
    with pytest.raises(UserError, match="needs an encoder with feature maps"):
        make().require(nn.Flatten())
    split = blobs.tests["test"]
    assert isinstance(split, ArraySplit)
    split.masks = None
    with pytest.raises(UserError, match=r"blobs does not say where the objects are; set dataset\.masks"):
        make().names(blobs)


def test_overlays_on_the_disk(tmp_path: Path) -> None:
    maps = {EIGEN: {"trained": np.ones((2, 4, 4), dtype=np.float16)}}
    Overlays(np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 8, 8), bool), maps).save(tmp_path, "")
    again = Overlays.load(tmp_path)
    assert again.images.shape == (2, 8, 8, 3)
    assert again.masks.all()
    assert again.maps[EIGEN]["trained"].shape == (2, 4, 4)


def test_pictures_of_one_encoder_and_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["dataset.train=60", "dataset.test=20", "dataset.balanced=20", "dataset.cache=null", "hardware=cpu"]
    keys = ["evaluation=attention", "evaluation.probe_epochs=2", "evaluation.bootstrap=50", "evaluation.pictured=5"]
    for name in ("resnet18", "resnet34"):
        encoder = [f"encoder=torchvision:{name}", "weights=null", f"to=runs/{name}"]
        assert main([*encoder, "dataset=confounded", *small, *keys]) == 0
    assert "could not be made" not in capsys.readouterr().out
    assert Image.open("runs/resnet18/figures/attention.png").size[1] > 250
    assert "Attention" in Page(Path("runs/resnet18/report.html")).text
    assert report(["runs"]) == 0
    Page(Path("runs/report.html")).assert_self_contained()
    drawn = [Path("runs/eigen-cam-confounded.png"), Path("runs/grad-cam-confounded.png")]
    assert {Image.open(file).size for file in drawn} == {Image.open(drawn[0]).size}
    assert "Grad-CAM of the same images" in Path("runs/report.html").read_text()

    for file in drawn:
        file.unlink()
    other = Overlays.load(Path("runs/resnet34"))
    Overlays(other.images + 1, other.masks, other.maps).save(Path("runs/resnet34"), "")
    assert report(["runs"]) == 0
    assert "Grad-CAM of the same images" not in Path("runs/report.html").read_text()
