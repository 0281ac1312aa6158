"""The exported encoder is of use without this package."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icl_msr.checkpoint import export_encoder
from icl_msr.encoders import Backbone, resnet, timm_model, tiny

BACKBONES = {
    "tiny": lambda: tiny(32, weights=None),
    "resnet18": lambda: resnet(32, name="resnet18", stem="auto", weights=None),
    "test_resnet": lambda: timm_model(32, name="test_resnet", options={}, weights=None),
}


@pytest.mark.parametrize("name", list(BACKBONES))
@torch.no_grad()
def test_what_the_json_says_rebuilds_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Backbone = BACKBONES[name]()
    for _ in range(2):
        backbone(torch.randn(4, 3, 32, 32))  # running statistics of their own
    backbone.to(memory_format=torch.channels_last)
    path = export_encoder(backbone, tmp_path, {"mean": (0.5, 0.5, 0.5), "dataset": "toys"})
    assert path == tmp_path / "encoder.safetensors"
    about: dict[str, Any] = json.loads((tmp_path / "encoder.json").read_text())
    assert (about["channels"], about["dataset"], about["mean"]) == (backbone.channels, "toys", [0.5, 0.5, 0.5])

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(about["load"], scope)
    assert "icl_msr" not in about["load"]
    assert not scope["net"].training
    images = torch.randn(4, 3, 32, 32)
    backbone.to(memory_format=torch.contiguous_format)  # sums in another order differ in the last bit
    assert torch.equal(scope["net"](images), backbone.eval()(images))


def test_the_file_holds_the_plain_networks_tensors(tmp_path: Path) -> None:
    backbone = tiny(32, weights=None)
    path = export_encoder(backbone, tmp_path, {})
    tensors = load_file(path)
    assert tensors.keys() == backbone.net.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in backbone.net.state_dict().items())
