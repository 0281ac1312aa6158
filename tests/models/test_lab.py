"""Colours against published values and the inverse conversion; halves of networks, and what they are together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import normalise
from icl_msr.models.backbones import Backbone, resnet, timm_model, tiny
from icl_msr.models.exported import export_encoder, load_encoder
from icl_msr.models.lab import LabBackbone, half, to_lab

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

PUBLISHED = {
    (0, 0, 0): (0, 0, 0),
    (255, 255, 255): (100, 0, 0),
    (128, 128, 128): (53.585, 0, 0),
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (255, 255, 0): (97.14, -21.55, 94.48),
    (0, 255, 255): (91.11, -48.09, -14.13),
    (255, 0, 255): (60.32, 98.23, -60.82),
}
"""CIE L*a*b* (D65) of 8-bit sRGB, as colour calculators give it, to the second decimal or so."""


def whole(name: str = "tiny") -> Backbone:
    if name == "tiny":
        return tiny(32, weights=None)
    return resnet(32, name=name, stem="auto", weights=None)


def images(n: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return normalise(torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8), MEAN, STD)


def unscaled(lab: Tensor) -> Tensor:
    return torch.stack([50 * lab[:, 0] + 50, 100 * lab[:, 1], 100 * lab[:, 2]], dim=1)


@pytest.mark.parametrize("rgb", PUBLISHED)
def test_published_colours(rgb: tuple[int, int, int]) -> None:
    lab = unscaled(to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1) / 255)).flatten()
    torch.testing.assert_close(lab, torch.tensor(PUBLISHED[rgb], dtype=torch.float64), rtol=0, atol=0.025)


def to_srgb(lab: list[float]) -> list[float]:
    """One colour back, by the definitions' inverses."""
    y = (lab[0] + 16) / 116
    ratios = [t**3 if t > 6 / 29 else (t - 4 / 29) * 3 * (6 / 29) ** 2 for t in (y + lab[1] / 500, y, y - lab[2] / 200)]
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()
    xyz = torch.tensor(ratios, dtype=torch.float64) * matrix.sum(1)
    linear = torch.linalg.solve(matrix, xyz).tolist()
    return [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear]


def test_colours_come_back() -> None:
    """Dark ones too, where both curves are straight lines."""
    rgb = torch.rand(40, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rgb[20:] /= 20
    for colour, lab in zip(rgb.flatten(1), unscaled(to_lab(rgb)).flatten(1), strict=True):
        assert to_srgb(lab.tolist()) == pytest.approx(colour.tolist(), abs=1e-6)


def test_scaled_channels_are_near_one() -> None:
    axis = torch.linspace(0, 1, 18)
    gamut = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(2)  # (3, 18, 324)
    lab = to_lab(gamut[None])[0].flatten(1)
    assert lab[0].min() == -1
    assert lab[0].max() == 1
    assert lab[1:].abs().amax(1).min() > 0.8
    assert lab[1:].abs().max() < 1.1
    outside, edge = torch.tensor([[-0.5, 2, 0.5], [0, 1, 0.5]]).view(2, 1, 3, 1, 1)
    assert torch.equal(to_lab(outside), to_lab(edge))


@pytest.mark.parametrize("name", ["tiny", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
@pytest.mark.parametrize("inputs", [1, 2])
@torch.no_grad()
def test_half_of_a_network(name: str, inputs: int) -> None:
    backbone = whole(name)
    before = {key: value.clone() for key, value in backbone.net.state_dict().items()}
    narrow = half(backbone.net, inputs).eval()
    assert all(torch.equal(value, before[key]) for key, value in backbone.net.state_dict().items())
    assert narrow.state_dict().keys() == before.keys()
    for key, value in narrow.state_dict().items():
        wide = before[key].shape
        assert value.shape[:1] == torch.Size([n // 2 for n in wide[:1]])
        if key == "conv1.weight":
            assert value.shape[1:] == (inputs, *wide[2:])
            assert not torch.equal(value[:1, :1], before[key][:1, :1])
    assert narrow(torch.randn(2, inputs, 32, 32)).shape == (2, backbone.channels // 2)


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
@torch.no_grad()
def test_two_halves_are_a_backbone(name: str) -> None:
    plain = whole(name)
    backbone = LabBackbone(plain, MEAN, STD).eval()
    features = backbone(images())
    assert features.shape == (4, backbone.channels) == (4, plain.channels)
    maps = backbone.maps(images())
    assert maps.shape == plain.eval().maps(images()).shape
    torch.testing.assert_close(maps.mean(dim=(2, 3)), features, rtol=1e-4, atol=1e-5)
    lab = to_lab(images() * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1))
    expected = torch.cat([backbone.net.l(lab[:, :1]), backbone.net.ab(lab[:, 1:])], dim=1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in backbone.parameters()) < 0.51 * sum(p.numel() for p in plain.parameters())
    first, second = (
        dict(net.named_parameters())["layer2.conv1.weight" if name == "tiny" else "layer2.0.conv1.weight"]
        for net in (backbone.net.l, backbone.net.ab)
    )
    assert not torch.equal(first, second)


def test_colours_are_exact_in_low_precision() -> None:
    """The conversion runs in fp32; its result has the precision of the images."""
    split = LabBackbone(whole(), MEAN, STD).net.split
    exact = torch.cat(split(images().bfloat16().float()), dim=1)
    rough = torch.cat(split(images().bfloat16()), dim=1)
    assert rough.dtype == torch.bfloat16
    assert torch.equal(rough, exact.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.cat(split(images()), dim=1), torch.cat(split(images()), dim=1).float())


def test_networks_of_other_kinds_are_refused(tmp_path: Path) -> None:
    others = [timm_model(32, name=name, options={}, weights=None) for name in ("test_vit", "test_resnet")]
    others.append(Backbone(nn.Sequential(nn.Flatten(), nn.Linear(3072, 8)), 8, ""))
    for other in others:
        with pytest.raises(UserError, match=r"choose backbone=tiny or one of torchvision's ResNets"):
            LabBackbone(other, MEAN, STD)
    path = export_encoder(whole(), tmp_path, {})
    with pytest.raises(UserError, match=r"random weights, and backbone\.weights=.*; drop backbone\.weights\."):
        LabBackbone(tiny(32, weights=str(path)), MEAN, STD)


ELSEWHERE = """
import json, os, sys
sys.modules["icl_msr"] = None  # an import of it fails
import torch
for folder, name in ((folder, name) for folder in sys.argv[1:] for name in ("encoder", "encoder-l", "encoder-ab")):
    os.chdir(folder)
    images, rgb = torch.load("images.pt")
    scope = {}
    exec(json.load(open(name + ".json"))["load"], scope)
    takes = {"encoder": lambda: images, "encoder-l": lambda: scope["to_lab"](rgb)[:, :1],
             "encoder-ab": lambda: scope["to_lab"](rgb)[:, 1:]}
    with torch.no_grad():
        torch.save(scope["net"](takes[name]()), name + ".pt")
"""


Exported = dict[str, tuple[LabBackbone, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Two networks and the folders of their exports, by the name of the network."""
    found = {}
    for name in ("tiny", "resnet18"):
        backbone, folder = LabBackbone(whole(name), MEAN, STD), tmp_path_factory.mktemp(name)
        for _ in range(2):
            backbone(torch.randn(4, 3, 32, 32))  # running statistics of their own
        backbone.eval()
        assert export_encoder(backbone, folder, {"dataset": "toys"}) == folder / "encoder.safetensors"
        found[name] = backbone, folder
    return found


@torch.no_grad()
def test_three_exports_load_without_this_package(exported: Exported) -> None:
    rgb = images() * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    for _, folder in exported.values():
        torch.save((images(), rgb), folder / "images.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, *(str(folder) for _, folder in exported.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for backbone, folder in exported.values():
        of_l, of_ab = backbone(images()).chunk(2, dim=1)
        for name, features in (("encoder", backbone(images())), ("encoder-l", of_l), ("encoder-ab", of_ab)):
            torch.testing.assert_close(torch.load(folder / f"{name}.pt"), features, rtol=1e-4, atol=1e-5)
            about = json.loads((folder / f"{name}.json").read_text())
            assert "icl_msr" not in about["load"]
            assert (about["channels"], about["dataset"]) == (features.shape[1], "toys")


@torch.no_grad()
@pytest.mark.parametrize("which", ["tiny", "resnet18"])
def test_three_exports_load_with_it(which: str, exported: Exported) -> None:
    backbone, folder = exported[which]
    again, _ = load_encoder(folder)
    assert isinstance(again, LabBackbone)
    assert torch.equal(again(images()), backbone(images()))
    assert (again.load, again.recipe) == (backbone.load, backbone.recipe)
    for name, part, channels in zip(("l", "ab"), backbone.parts().values(), backbone.net.split(images()), strict=True):
        again, about = load_encoder(folder / f"encoder-{name}.safetensors")
        assert torch.equal(again(channels), part(channels))
        assert (again.channels, again.load.split(), again.recipe) == (part.channels, part.load.split(), about["recipe"])
        assert load_file(folder / f"encoder-{name}.safetensors").keys() == part.net.state_dict().keys()


TINY = {"builder": "tiny", "image_size": 32}


@pytest.mark.parametrize(
    "change",
    [
        {"whole": {"builder": "os.system", "command": "true"}},
        {"whole": {"builder": "lab_encoder", "whole": TINY, "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"whole": {**TINY, "weights": "x"}, "surplus": 1},
        {"whole": "tiny"},
        {"mean": ["__import__('os')"]},
        {"mean": None},
    ],
)
def test_recipes_are_data(change: dict[str, Any], tmp_path: Path) -> None:
    export_encoder(LabBackbone(whole(), MEAN, STD), tmp_path, {})
    about = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps({**about, "recipe": {**about["recipe"], **change}}))
    with pytest.raises(UserError, match=r"has a recipe that is unknown here"):
        load_encoder(tmp_path)


def test_a_network_of_another_package_is_exported_and_not_rebuilt(tmp_path: Path) -> None:
    plain = whole()
    plain.recipe = None
    export_encoder(LabBackbone(plain, MEAN, STD), tmp_path, {})
    for name in ("encoder", "encoder-l", "encoder-ab"):
        with pytest.raises(UserError, match="belongs to another package"):
            load_encoder(tmp_path / f"{name}.safetensors")
