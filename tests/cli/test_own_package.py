"""Components of a user's own package: by `_target_` and Hydra's search path, without a fork."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from support.inprocess import loggers_put_back

from icl_msr.cli.command import main
from icl_msr.core.config import Settings

CODE = '''
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.losses.contrastive import unit
from icl_msr.methods import Method
from icl_msr.methods.base import Pair


class Attraction(Method):
    """Two views attract each other, and nothing repels."""

    def __init__(self, backbone, classes, *, width: PositiveInt, strength: PositiveFloat):
        super().__init__(backbone, mlp(backbone.channels, width))
        self.strength = strength

    def project(self, features):
        return [self.projector(view) for view in features]

    def loss(self, embeddings, targets, step):
        first, second = map(unit, embeddings)
        return self.strength * (first - second).square().sum(1).mean()

    def pairs(self, features, embeddings, targets):
        return [Pair(embeddings[0], embeddings[1], features[1], self.projector)]


def stripes(*, images: PositiveInt, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def split():
        labels = torch.arange(images) % 2
        pictures = torch.randint(0, 200, (images, 3, 16, 16), dtype=torch.uint8, generator=generator)
        pictures[labels == 1, :, ::2] += 55
        return ArraySplit(pictures, labels)

    return Dataset("stripes", ("plain", "striped"), 16, split(), {"original": split()})


def flat(image_size, *, channels: PositiveInt) -> Backbone:
    load = f"""
from torch import nn
net = nn.Sequential(nn.Conv2d(3, {channels}, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
    scope = {}
    exec(load, scope)
    return Backbone(scope["net"], channels, load)
'''

CONF = {
    "method/mine.yaml": "_target_: mypkg.parts.Attraction\nwidth: 8\nstrength: 2.0\n",
    "dataset/mine.yaml": (
        "defaults: [{override /augment@_global_.augment: mine}]\n_target_: mypkg.parts.stripes\nimages: 32\nseed: 0\n"
    ),
    "backbone/mine.yaml": "_target_: mypkg.parts.flat\nchannels: 12\n",
    "augment/mine.yaml": "defaults: [small, _self_]\ngray: 0.5\n",
    "experiment/mypkg/all.yaml": (
        "# @package _global_\n"
        "defaults: [{override /method: mine}, {override /dataset: mine}, {override /backbone: mine}]\n"
        "loader: {batch_size: 8}\n"
    ),
}
SEARCH = "hydra.searchpath=[pkg://mypkg.conf]"
MINE = (SEARCH, "method=mine", "dataset=mine", "backbone=mine", "regularizer=none", "loader.batch_size=8")
SHORT = ("evaluation=light", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "logger=csv")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the package."""
    home = tmp_path_factory.mktemp("home")
    broken = {"conf/method/broken.yaml": "strength: 1\nwidth: [\n", "conf/method/latin.yaml": "# caf\xe9"}
    files = {"__init__.py": "", "parts.py": CODE, **{f"conf/{n}": t for n, t in CONF.items()}, **broken}
    for name, text in files.items():
        file = home / "mypkg" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin1"))
    return home


@pytest.fixture
def command(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`python -m icl_msr.run` in this process, with a job of the test's own."""
    monkeypatch.setattr(sys, "argv", ["icl_msr.run"])
    monkeypatch.syspath_prepend(home)
    with loggers_put_back():
        yield lambda job, *words: main(job, [*words, f"hydra.run.dir={tmp_path}/run"])
    for name in [name for name in sys.modules if name.startswith("mypkg")]:
        del sys.modules[name]


@pytest.mark.parametrize("words", [MINE, (SEARCH, "experiment=mypkg/all", "regularizer=none")], ids=["words", "recipe"])
def test_own_components_are_composed_and_checked(words: tuple[str, ...], command: Callable[..., int]) -> None:
    found: list[dict[str, Any]] = []

    def job(settings: Settings, config: DictConfig) -> float:
        found.append(settings.model_dump())
        return 0.0

    assert command(job, *words, "method.strength=3.0") == 0
    (composed,) = found
    assert composed["method"] == {"_target_": "mypkg.parts.Attraction", "width": 8, "strength": 3.0}
    assert composed["augment"]["_target_"] == "icl_msr.augment.Augmentation"
    assert (composed["augment"]["gray"], composed["loader"]["batch_size"]) == (0.5, 8)


MISTAKES = [
    ("method.strenght=1", "method.strenght is not a key; did you mean method.strength"),
    ("+method.strenght=1", "method.strenght is not a key of Attraction; did you mean strength?"),
    ("method.strength=-1", "method.strength=-1 is not allowed; it should be greater than 0."),
    ("dataset.image=3", "dataset.image is not a key; did you mean dataset.images"),
    ("method=mien", "method=mien does not exist; did you mean mine?"),
    ("method=null", "method=null does not exist; choose one of", ", mine, moco"),
    ("backbone=tinny", "backbone=tinny does not exist; did you mean tiny"),
    ("experiment=mypkg/al", "experiment=mypkg/al does not exist; did you mean mypkg/all?"),
    ("method._target_=mypkg.parts.Atraction", "method._target_=mypkg.parts.Atraction cannot be imported"),
    ("method=broken", "mypkg/conf/method/broken.yaml is not YAML", "in line 3"),
    ("method=latin", "is not in UTF-8"),
]


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case[0])
def test_mistakes_know_the_own_choices(
    case: tuple[str, ...], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    word, *parts = case
    words = [w for w in MINE if w.partition("=")[0] != word.partition("=")[0]]

    assert command(lambda *_: 0.0, *words, word) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert all(part in line for part in parts), line


# Real processes


@pytest.fixture(scope="module")
def python(home: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`python -m`, with the package on its path."""
    environment = {**os.environ, "PYTHONPATH": str(home)}

    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        line = [sys.executable, "-m", *words]
        return subprocess.run(line, env=environment, cwd=home, capture_output=True, text=True, check=False)

    return call


@pytest.mark.slow
def test_a_run_of_own_components(python: Callable[..., Any], home: Path) -> None:
    """Trained, measured, continued and exported."""
    run = home / "run"
    done = python("icl_msr.run", *MINE, *SHORT, f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["name"] == "mine-none-none-mine-mine"
    assert (results["classes"], results["chance"]) == (["plain", "striped"], 0.5)
    assert results["parameters"] == 12 * (27 + 1)
    assert results["final"]["loss"] > 0
    assert {a["split"] for a in results["records"]["accuracy"]} == {"original"}

    done = python("icl_msr.run", f"resume={run}", "trainer.max_epochs=2")
    assert done.returncode == 2
    assert done.stderr.endswith("is code of the package mypkg; if you trust it, add trust=mypkg.\n")
    done = python("icl_msr.run", f"resume={run}", "trainer.max_epochs=2", "trust=mypkg")
    assert done.returncode == 0, done.stderr
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8
    done = python("icl_msr.export", str(run), "trust=mypkg", "--to", str(home / "exported"))
    assert done.returncode == 0, done.stderr
    same = [(folder / "encoder.safetensors").read_bytes() for folder in (run, home / "exported")]
    assert same[0] == same[1]


@pytest.mark.slow
@pytest.mark.parametrize(("word", "sentence"), [MISTAKES[0], MISTAKES[4]])
def test_mistakes_in_a_process(word: str, sentence: str, python: Callable[..., Any], home: Path) -> None:
    words = [w for w in MINE if w.partition("=")[0] != word.partition("=")[0]]
    done = python("icl_msr.run", *words, *SHORT, word, f"hydra.run.dir={home}/none")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(sentence)
    assert not (home / "none" / "config.yaml").exists()


@pytest.mark.slow
def test_own_components_with_ours(python: Callable[..., Any], home: Path) -> None:
    """Our method and regularizer on the user's backbone and data, in a sweep with processes of its own."""
    words = (SEARCH, "dataset=mine", "backbone=mine", "loader.batch_size=8", "method.hidden_dim=16")
    jobs = ("-m", "method=simclr,moco", "hydra/launcher=process", f"hydra.sweep.dir={home}/sweep")
    done = python("icl_msr.run", *words, *SHORT, *jobs, "method.embedding_dim=8", "schedule.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    assert len(list((home / "sweep").glob("*/results.json"))) == 2
