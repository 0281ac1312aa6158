"""Checkpoints of other programs."""

import argparse
import io
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.evaluation.subject import find
from icl_msr.models.backbones import resnet
from icl_msr.models.weights import read_weights


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18()


def named(prefix: str, seed: int = 1) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in network(seed).state_dict().items()}


def layers_of(prefix: str) -> dict[str, Tensor]:
    """As lightly has it: the layers in `nn.Sequential`, without the classifier."""
    inside = nn.Sequential(*list(network().children())[:-1])
    return {f"{prefix}{name}": tensor for name, tensor in inside.state_dict().items()}


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "a plain state dict": lambda: named(""),
    "MoCo": lambda: {
        "epoch": 200,
        "state_dict": named("module.encoder_q.") | named("module.encoder_k.", seed=2) | {"module.queue": torch.ones(9)},
        "optimizer": OPTIMIZER,
    },
    "DINO": lambda: {
        "student": named("module.backbone.", seed=2),
        "teacher": named("backbone."),
        "args": argparse.Namespace(arch="resnet18"),
    },
    "lightly": lambda: {"state_dict": layers_of("backbone."), "callbacks": {}},
    "solo-learn": lambda: {
        "state_dict": named("backbone.") | named("momentum_backbone.", seed=2) | {"projector.weight": torch.ones(2)}
    },
    "the model of DDP": lambda: {"model": named("module.")},
    "an old one": lambda: {"state_dict": without_counters(named("encoder."))},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_networks_in_checkpoints(name: str, zipped: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.pth.tar"
    torch.save(CHECKPOINTS[name](), file, _use_new_zipfile_serialization=zipped)
    found = resnet(224, name="resnet18", stem="standard", weights=str(file)).net.state_dict()
    expected = network().state_dict()
    assert len(found) == 120
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_prefix_in_safetensors_and_the_classifier_beside(tmp_path: Path) -> None:
    file = tmp_path / "ddp.safetensors"
    save_file(named("module."), file)
    encoder = find("encoder", "torchvision:resnet18", str(file)).fitting(64, 0)
    state = encoder.net.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in network().state_dict().items() if name in state)
    read = read_weights(str(file), encoder.net)
    assert torch.equal(read["fc.weight"], network().fc.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda: named("left.") | named("right.", seed=2), r"holds several networks that fit \(left\., right\.\)"),
        (network, "could execute code, so it was not loaded; where you trust it, convert it: import torch"),
        (lambda: {"state_dict": {"x.weight": torch.ones(1)}}, "holds no weights of this backbone"),
        (lambda: {"model": torchvision.models.resnet34().state_dict()}, "belongs to another backbone|holds no weights"),
        (lambda: torchvision.models.resnet34().state_dict(), "belongs to another backbone"),
    ],
)
def test_what_is_refused(content: Callable[[], Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    torch.save(content(), file)
    with pytest.raises(UserError, match=sentence) as told:
        resnet(224, name="resnet18", stem="standard", weights=str(file))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda file: file.write_text("junk"), "cannot be read as a checkpoint of PyTorch"),
        (lambda file: zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED).writestr("a", bytes(9)), "is compressed"),
    ],
)
def test_files_of_another_kind(write: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    write(tmp_path / "model.pth")
    with pytest.raises(UserError, match=sentence):
        read_weights(str(tmp_path / "model.pth"), network())


def test_the_lines_that_convert_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": named("left.") | named("right.", seed=2)}, "two.pth")
    with pytest.raises(UserError) as told:
        read_weights("two.pth", network())
    line = str(told.value).partition("of its own: ")[2].removesuffix(".").replace("PREFIX", "left.")
    with redirect_stdout(io.StringIO()):
        exec(line, {})
    assert load_file("two.safetensors").keys() == network().state_dict().keys()


@pytest.mark.parametrize("source", ["encoder", "checkpoint"])
def test_a_checkpoint_that_does_not_say_its_network(source: str, tmp_path: Path) -> None:
    file = tmp_path / "moco.pth.tar"
    torch.save({"state_dict": named("module.encoder_q.")}, file)
    with pytest.raises(UserError, match=rf"name that: encoder=torchvision:resnet50 weights={file}"):
        find(source, str(file), None)


def test_a_checkpoint_is_walked_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Mappings that hold each other twice would take 2 ** 60 steps, and deep ones end in Python's stack."""
    twice: dict[str, Any] = named("")
    for _ in range(60):
        twice = {"a": twice, "b": twice}
    deep: dict[str, Any] = named("")
    for _ in range(5000):
        deep = {"a": deep}
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(50_000)  # to write it
    for number, content in enumerate((twice, deep)):
        torch.save(content, tmp_path / f"{number}.pth")
    sys.setrecursionlimit(1000)
    for number in range(2):
        assert read_weights(str(tmp_path / f"{number}.pth"), network()).keys() == network().state_dict().keys()


def test_headers_and_parts_that_are_too_large(tmp_path: Path) -> None:
    header = b"{" + b" " * 11_000_000 + b"}"
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="has a header of 11 MB, as no file of weights has"):
        read_weights(str(tmp_path / "x.safetensors"), network())
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data/0", bytes(1000))
        for number in range(1, 9):  # the same bytes under further names
            part = copy(archive.infolist()[0])
            part.filename = f"x/data/{number}"
            archive.filelist.append(part)
    with pytest.raises(UserError, match="is compressed, as no checkpoint of PyTorch is"):
        read_weights(str(tmp_path / "x.pth"), network())
