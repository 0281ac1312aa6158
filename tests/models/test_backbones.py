"""Backbones: their cost, their stems, and weights that come from elsewhere."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from icl_msr.core.errors import UserError
from icl_msr.models.backbones import Backbone, resnet, timm_model, tiny
from icl_msr.models.exported import export_encoder
from icl_msr.models.heads import mlp


def make_resnet(
    image_size: int = 32, name: str = "resnet18", stem: Any = "auto", weights: str | None = None
) -> Backbone:
    return resnet(image_size, name=name, stem=stem, weights=weights)


def make_timm(image_size: int, name: str, weights: str | None = None, **options: Any) -> Backbone:
    return timm_model(image_size, name=name, options=options, weights=weights)


def multiply_adds(backbone: nn.Module, image_size: int) -> int:
    """Of the convolutions, for one image."""
    counts: list[int] = []

    def count(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        counts.append(output[0].numel() * layer.weight[0].numel())

    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    return sum(counts)


def images(size: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_tiny_is_tiny() -> None:
    backbone = tiny(32, weights=None)
    assert 0.010e9 < multiply_adds(backbone, 32) <= 0.02e9
    assert backbone(images(32)).shape == (2, backbone.channels) == (2, 128)
    assert backbone.maps(images(32)).shape == (2, 128, 4, 4)


@pytest.mark.parametrize(
    ("size", "stem", "kernel", "pools", "side"),
    [
        (32, "auto", 3, False, 4),
        (48, "auto", 3, False, 6),
        (64, "auto", 3, True, 4),
        (96, "auto", 3, True, 6),
        (112, "auto", 7, True, 4),
        (32, "standard", 7, True, 1),
        (224, "small", 3, True, 14),
    ],
)
def test_stems_fit_the_image(size: int, stem: str, kernel: int, pools: bool, side: int) -> None:
    backbone = make_resnet(size, stem=stem).eval()
    net: Any = backbone.net
    assert net.conv1.kernel_size == (kernel, kernel)
    assert net.conv1.stride == ((1, 1) if kernel == 3 else (2, 2))
    assert isinstance(net.maxpool, nn.MaxPool2d) == pools
    with torch.no_grad():
        assert backbone.maps(images(size, 1)).shape == (1, 512, side, side)


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (lambda: tiny(32, weights=None), 128),
        (lambda: make_resnet(32), 512),
        (lambda: make_resnet(64, "resnet50"), 2048),
        (lambda: make_timm(32, "test_resnet"), 96),
    ],
)
@torch.no_grad()
def test_features_are_the_mean_of_the_last_map(build: Callable[[], Backbone], channels: int) -> None:
    backbone = build().eval()
    assert backbone.channels == channels
    features = backbone(images(64))
    assert features.shape == (2, channels)
    torch.testing.assert_close(backbone.maps(images(64)).mean(dim=(2, 3)), features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "first", "last"),
    [
        (lambda: tiny(32, weights=None), "layer3.conv1.weight", "layer3.downsample.1.bias"),
        (lambda: resnet(32, name="resnet18", stem="auto", weights=None), "layer4.0.conv1.weight", "layer4.1.bn2.bias"),
        (
            lambda: timm_model(32, name="vit_tiny_patch16_224", options={"patch_size": 8, "depth": 3}, weights=None),
            "blocks.2.norm1.weight",
            "norm.bias",
        ),
    ],
)
def test_the_last_stage(build: Callable[[], Backbone], first: str, last: str) -> None:
    backbone = build()
    inside = {id(p) for p in backbone.last_stage()}
    names = [name for name, p in backbone.net.named_parameters() if id(p) in inside]
    assert len(names) == len(inside)
    assert (names[0], names[-1]) == (first, last)


def test_a_transformer_is_told_the_image_size() -> None:
    backbone = make_timm(64, "test_vit", patch_size=8).eval()
    assert "img_size=64" in backbone.load
    features = backbone(images(64))
    assert features.shape == (2, backbone.channels)
    assert backbone.maps(images(64)).shape == (2, backbone.channels, 8, 8)


def test_options_reach_timm() -> None:
    backbone = make_timm(32, "test_vit", patch_size=4, drop_path_rate=0.5)
    assert "patch_size=4" in backbone.load
    assert "drop_path_rate=0.5" in backbone.load
    assert backbone(images(32)).shape == (2, backbone.channels)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"checkpoint_path": "a.pth"}, r"backbone\.options\.checkpoint_path is not possible; .* backbone\.weights"),
        ({"pretrained": True}, r"backbone\.options\.pretrained is not possible"),
        ({"a=1, b": 1}, "is not possible"),
        ({"block": nn.Linear}, r"backbone\.options\.block=.* is not plain data"),
        ({"layers": (1, 2)}, r"\(1, 2\) is not plain data"),
        ({"depths": {1: 2}}, "is not plain data"),
        ({"drop_rate": float("inf")}, "inf is not plain data"),
    ],
)
def test_options_are_plain_data(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_timm(32, "test_vit", **options)


def test_the_recipe_says_what_was_built() -> None:
    assert tiny(48, weights=None).recipe == {"builder": "tiny", "image_size": 48}
    for size, stem in ((96, "small"), (112, "standard")):
        recipe = {"builder": "resnet", "image_size": size, "name": "resnet18", "stem": stem}
        assert make_resnet(size).recipe == recipe
    given = {"patch_size": 8}
    backbone = timm_model(64, name="test_vit", options=given, weights=None)
    options = {"patch_size": 8, "img_size": 64}
    assert backbone.recipe == {"builder": "timm_model", "image_size": 64, "name": "test_vit", "options": options}
    assert given == {"patch_size": 8}


@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_recipe_builds_a_plain_network(size: int) -> None:
    for backbone in (tiny(size, weights=None), make_resnet(size), make_timm(size, "test_resnet")):
        assert "icl_msr" not in backbone.load
        scope: dict[str, Any] = {}
        exec(backbone.load, scope)
        scope["net"].load_state_dict(backbone.net.state_dict())


@pytest.mark.parametrize(
    "build",
    [
        lambda weights: tiny(32, weights=weights),
        lambda weights: make_resnet(weights=weights),
        lambda weights: make_timm(32, "test_resnet", weights),
    ],
)
@torch.no_grad()
def test_weights_come_from_a_run_folder_or_a_file(build: Callable[[str | None], Backbone], tmp_path: Path) -> None:
    source = build(None).eval()
    file = export_encoder(source, tmp_path, {})
    expected = source(images(32))
    assert not torch.equal(build(None).eval()(images(32)), expected)
    for weights in (tmp_path, file):
        assert torch.equal(build(str(weights)).eval()(images(32)), expected)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    file = str(export_encoder(tiny(32, weights=None), tmp_path, {}))
    with pytest.raises(UserError, match="belongs to another backbone"):
        make_resnet(weights=file)
    export_encoder(make_resnet(32), tmp_path, {})  # the same names, another stem
    with pytest.raises(UserError, match=r"differs in conv1\.weight"):
        make_resnet(224, weights=str(tmp_path))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a \.safetensors file nor a run folder"):
        tiny(32, weights=str(tmp_path))
    (tmp_path / "encoder.safetensors").write_text("nonsense")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        tiny(32, weights=str(tmp_path))
    with pytest.raises(UserError, match="neither"):
        tiny(32, weights="torchvision")


def test_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.resnet18()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: published)
    backbone = make_resnet(224, weights="torchvision")
    assert torch.equal(backbone.net.get_parameter("conv1.weight"), published.conv1.weight)
    with pytest.raises(UserError, match=r"add backbone\.stem=standard"):
        make_resnet(32, weights="torchvision")

    def offline(name: str, weights: str) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\)"):
        make_resnet(224, weights="torchvision")


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"resnet19 is not a torchvision ResNet; choose one of .*resnet18"):
        make_resnet(name="resnet19")
    with pytest.raises(UserError, match=r"backbone\.name=resnet1 is not a timm model; did you mean resnet18 or"):
        make_timm(32, "resnet1")
    with pytest.raises(UserError, match=r"timm cannot build test_vit with .*depthh"):
        make_timm(32, "test_vit", depthh=3)


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({}, [nn.Linear, _BatchNorm, nn.ReLU, nn.Linear]),
        ({"norm": False}, [nn.Linear, nn.ReLU, nn.Linear]),
        ({"norm_last": True}, [nn.Linear, _BatchNorm, nn.ReLU, nn.Linear, _BatchNorm]),
    ],
)
def test_heads(keys: dict[str, bool], kinds: list[type[nn.Module]]) -> None:
    head = mlp(8, 16, 4, **keys)
    assert [isinstance(layer, kind) for layer, kind in zip(head, kinds, strict=True)] == [True] * len(kinds)
    assert head(torch.randn(3, 8)).shape == (3, 4)
    for layer, following in zip(head, [*head[1:], None], strict=True):
        if isinstance(layer, nn.Linear):
            assert (layer.bias is None) == isinstance(following, _BatchNorm)


def test_backbones_take_their_keys_by_name() -> None:
    for function in (tiny, resnet, timm_model):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert set(kinds[1:]) == {inspect.Parameter.KEYWORD_ONLY}


def test_foreign_safetensors_fit_too(tmp_path: Path) -> None:
    """Any file with the state dict of the plain network will do."""
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    backbone = make_resnet(224, weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(backbone.net.get_parameter("conv1.weight"), plain.conv1.weight)
