"""What a saved config may name and refer to."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.tiny import composed

from icl_msr.core import saved, trust
from icl_msr.core.config import config_dir
from icl_msr.core.errors import UserError

FILE = Path("run/config.yaml")


def choices() -> list[str]:
    groups = [group for group in trust.KINDS if group != "trainer"]
    names = [(group, file.stem) for group in groups for file in sorted((config_dir() / group).glob("*.yaml"))]
    labelled = [f"+dataset@dataset.labelled={name}" for group, name in names if group == "dataset"]
    return [*(f"{group}={name}" for group, name in names), *labelled]


@pytest.mark.parametrize("word", choices())
def test_whatever_can_be_chosen_can_be_saved(word: str) -> None:
    inside = ["dataset=images"] if "@dataset.labelled" in word else []
    config: Any = OmegaConf.to_container(composed(*inside, word))
    trust.require(config, FILE)


GOOD = {
    "optimizer": ["torch.optim.Adam", "torch.optim.adam.Adam", "timm.optim.Lars"],
    "schedule": ["torch.optim.lr_scheduler.StepLR", "icl_msr.training.optimization.cosine"],
    "backbone": ["icl_msr.models.backbones.tiny"],
    "dataset": ["icl_msr.data.torchvision_sets.cifar10"],
    "callbacks.x": ["pytorch_lightning.callbacks.EarlyStopping", "icl_msr.training.online.OnlineEvaluation"],
    "logger.x": ["pytorch_lightning.loggers.CSVLogger", "icl_msr.training.loggers.TensorBoard"],
    "method.x": ["torch.nn.GELU", "torchvision.transforms.ColorJitter", "torchvision.transforms.v2.JPEG"],
    "trainer.profiler": ["pytorch_lightning.profilers.SimpleProfiler"],
}
BAD = {
    "optimizer": ["torch.hub.load", "torch.load", "torch.optim.Adam.step", "torch.optim.lr_scheduler.StepLR"],
    "schedule": ["torch.optim.Adam", "icl_msr.training.optimization.follow", "icl_msr.training.optimization.math.exp"],
    "method": ["icl_msr.methods.MoCo.load_state_dict", "icl_msr.methods.Output", "os.system", "builtins.exec"],
    "backbone": ["icl_msr.models.backbones.read_weights", "torch.nn.Identity", "torchvision.models.resnet18"],
    "dataset": ["icl_msr.data.folders.Path", "pkgutil.resolve_name", "subprocess.run"],
    "callbacks.x": ["pytorch_lightning.Trainer", "runpy.run_path"],
    "trainer": ["pytorch_lightning.cli.LightningCLI", "pytorch_lightning.LightningModule"],
    "method.x": ["torch.utils.model_zoo.load_url", "torch.jit.load", "timm.create_model", "torch.nn.init.os.system"],
    "seed.x": ["torch.hub.load", "..", "", 3, ["os.system"]],
}  # fmt: skip


def at(key: str, target: Any) -> dict[str, Any]:
    node: Any = {"_target_": target}
    for name in reversed(key.split(".")):
        node = {name: node}
    if key == "method.x":
        node["method"]["_target_"] = "icl_msr.methods.MoCo"
    if key == "trainer.profiler":
        node["trainer"]["_target_"] = "pytorch_lightning.Trainer"
    return dict(node)


@pytest.mark.parametrize(("key", "target"), [(key, target) for key in GOOD for target in GOOD[key]])
def test_of_its_kind(key: str, target: str) -> None:
    trust.require(at(key, target), FILE)


@pytest.mark.parametrize(("key", "target"), [(key, target) for key in BAD for target in BAD[key]])
def test_of_another_kind(key: str, target: Any) -> None:
    with pytest.raises(UserError, match=r"_target_=.* in run/config\.yaml is not what may stand there") as told:
        trust.require(at(key, target), FILE)
    assert "trust=" not in str(told.value)


def test_a_package_is_trusted_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not imported before."""
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = {**at("method", "mine.Method"), **at("backbone", "other.net")}
    try:
        assert trust.given(["a=1"]) == ["a=1"]
        with pytest.raises(UserError, match=r"is code of the package mine; if you trust it, add trust=mine\."):
            trust.require(config, FILE)
        assert trust.given(["a=1", "trust=mine"]) == ["a=1"]
        with pytest.raises(UserError, match=r"add trust=other\."):
            trust.require(config, FILE)
        assert trust.given(["trust=[mine, other]"]) == []
        trust.require(config, FILE)
        assert trust.word() == ["trust=[mine,other]"]
        with pytest.raises(UserError, match="names no package"):
            trust.given(["trust=os"])
    finally:
        trust.given([])
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    ("listed", "words", "stays"),
    [("", ["run=x"], False), ("{here}", ["run=x"], True), ("", ["method._target_=mine.M"], True), (":", [], False),
     ("", ["hydra.searchpath=[pkg://mine]"], True), ("", ["trust=mine"], True)],
)  # fmt: skip
def test_the_working_directory_is_left(
    listed: str, words: list[str], stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", listed.format(here=tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), "", *sys.path])
    trust.leave_working_directory(words)
    assert (str(tmp_path) in sys.path, "" in sys.path) == (stays, stays)


def test_what_is_saved_needs_no_more_than_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT", "/data")
    config = {"seed": 3, "a": {"seed": "${seed}", "root": "${oc.env:ROOT}/x", "b": ["${.c}", "${..seed}", "${a.seed}"]}}
    config["a"]["b"][0] = "${a.root}"  # type: ignore[index]
    text = saved.as_yaml(OmegaConf.create(config))
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.delenv("ROOT")
    found = saved.read(tmp_path / "config.yaml")
    assert found == {"seed": 3, "a": {"seed": "${seed}", "root": "/data/x", "b": ["/data/x", 3, 3]}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: ${oc.env:HOME}", r"a=\$\{oc\.env:HOME\} in .* asks for more"),
        ("a: ${oc.decode:1}", "asks for more"),
        ("a: 1\nb: ${oc.select:a}", "asks for more"),
        ("a: ${b}\nb: ${a}", "asks for more"),
        ("a: [1]\nb: ${a}", "asks for more"),
        ("a: b\nb: ${${a}}", "asks for more"),
        ("a: &x 1\nb: *x", r"uses YAML aliases, as \*x"),
        ("a: " + "[" * 100 + "]" * 100, "nests more than 40"),
        ("a: " + "x" * 600_000, "larger than 0.5 MB"),
    ],
)
def test_configs_that_are_more_than_data(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        saved.read(tmp_path / "config.yaml")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="is not a regular file"):
            saved.read(path)


def test_keys_by_which_something_is_written(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("hydra: {run: {dir: x}}\ndataset: {cache: /home/me, download: true, root: x}")
    found = saved.read(tmp_path / "config.yaml")
    assert found == {"dataset": {"cache": ".cache/icl-msr", "download": False, "root": "x"}}
    (tmp_path / "config.yaml").write_text("dataset: {cache: null}")
    assert saved.read(tmp_path / "config.yaml") == {"dataset": {"cache": None}}
