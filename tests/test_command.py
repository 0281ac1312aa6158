"""Mistakes on the command line: exit code 2, one sentence that names the key and a way out, and nothing built."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
from omegaconf import DictConfig
from tiny import DATA

from icl_msr import run as program
from icl_msr.command import main
from icl_msr.errors import UserError
from icl_msr.run import run


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`python -m icl_msr.run` in this process."""
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.setattr(sys, "argv", ["icl_msr.run"])
    folders = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]

    def call(*words: str, job: Callable[[DictConfig], float] = run) -> Answer:
        code = main(job, [*words, *folders])
        return Answer(code, *capsys.readouterr())

    yield call
    for handler in [h for h in logging.root.handlers if h not in handlers]:
        handler.close()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def refused(answer: Answer, *parts: str) -> None:
    assert answer.code == 2
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert all(part in line for part in parts), line
    assert line[-1] in ".?'"


BEFORE_ANYTHING_IS_BUILT = [
    # names
    ("method=mocco", "method=mocco", "did you mean moco?"),
    ("negatives=path", "negatives=path", "patch"),
    ("method=null", "method=null", "byol, moco, simclr"),
    ("method=", "method=", "byol, moco, simclr"),
    ("metod=simclr", "metod", "did you mean method?"),
    ("metod.temperature=1", "metod", "did you mean method?"),
    ("method.temprature=0.2", "method.temprature", "method.temperature"),
    ("trainer.max_epoch=3", "trainer.max_epoch", "did you mean trainer.max_epochs"),
    ("trainer={max_epoch:3}", "trainer.max_epoch", "did you mean trainer.max_epochs"),
    ("sead=3", "sead", "did you mean seed?"),
    ("~method.foo", "method.foo", "method.momentum"),
    ("hydra.run.foo=3", "hydra.run.foo", "--cfg"),
    ("+method.foo=1", "method.foo", "of MoCo", "temperature"),
    ("+foo=1", "foo", "choose one of augment"),
    ("+seed=1", "seed", "leave the plus out"),
    ("++trainer.max_epoch=3", "trainer.max_epoch", "did you mean max_epochs?"),
    ("method.temperature=${foo}", "method.temperature", "'foo' not found", "${seed}"),
    ("method._target_=icl_msr.nothing", "method._target_=icl_msr.nothing"),
    ("method._target_=icl_msr.optimization.Optimization", "method.", "is missing"),
    # values
    ("method.temperature=-1", "method.temperature=-1", "greater than 0"),
    ("trainer.max_epochs=abc", "trainer.max_epochs", '"abc"', "a whole number"),
    ("trainer.gradient_clip_val=abc", "trainer.gradient_clip_val", "a number or null"),
    ("trainer=3", "trainer=3", "a mapping"),
    ("regularizer.weights=foo", "regularizer.weights", "meta, uniform_only, random, random_net, ones or joint"),
    ("regularizer.width=12", "regularizer.width=12", "a multiple of 8"),
    ("loader.batch_size=1", "loader.batch_size=1", "at least 2"),
    ("seed=-1", "seed=-1", "at least 0"),
    ("optimizer.lr=inf", "optimizer.lr=Infinity", "a finite number"),
    ("dataset.rho=2", "dataset.rho=2", "at most 1"),
    ("dataset.cache=3", "dataset.cache=3", "text or null"),
    ("hardware.channels_last=maybe", "hardware.channels_last", "true or false"),
    ("evaluation.knn=[foo]", "evaluation.knn.0", '"foo"', "wmse, icl, instdisc or dino"),
    ("evaluation.learning_rates=[]", "evaluation.learning_rates=[]", "1 or more"),
    ("augment.scale=[0.5,0.2]", "augment.scale=[0.5, 0.2]", "must not be larger"),
    ("augment.scale=[0.5]", "augment.scale=[0.5]", "2 or more"),
    ("augment.views=[{blurr:1}]", "augment.views.0", "'blurr'", "blur"),
    ("augment.views=[{blur:2}]", "augment.views.0", "2 should be at most 1"),
    ("augment.views=3", "augment.views=3", "a list"),
    # words
    ("a b", "a b", "key=value"),
    ("method.temperature=[1", "method.temperature=[1", "key=value"),
    ("seed=0,1", "seed=0,1", "add -m"),
    # several words
    ("dataset=arrays", "dataset.path", "add dataset.path=<value>"),
    ("dataset=arrays dataset.path=3", "dataset.path=3", "text or a list"),
    ("regularizer=none regularizer.lam=1", "regularizer.lam", "regularizer is none"),
    ("regularizer=none +regularizer.lam=1", "regularizer.lam", "regularizer is none"),
    ("evaluation=none +evaluation.knn=[dino]", "evaluation.knn", "evaluation is none"),
    ("backbone=timm:resnet18 backbone.options={foo:1}", "backbone.options.foo", "+backbone.options.foo"),
    ("-m method=simclr,mocco", "method=mocco", "did you mean moco?"),
    ("method.temprature=0.2 -m seed=0,1", "method.temprature", "method.temperature"),
]


@pytest.mark.parametrize("case", BEFORE_ANYTHING_IS_BUILT, ids=lambda case: case[0])
def test_mistakes_are_answered_before_anything_is_built(
    case: tuple[str, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "build", lambda node, *_: pytest.fail(f"{node} was built"))
    line, *parts = case
    words = ["a b"] if line == "a b" else line.split()
    refused(command(*words), *parts)


IN_THE_WORLD = [
    ("dataset=arrays dataset.path=/no/such.npz", "/no/such.npz", "dataset.path"),
    ("dataset=arrays dataset.path={folder}", "cannot be read as .npz", "numpy.savez"),
    ("dataset=imagefolder dataset.root=/no/such", "/no/such", "dataset.root"),
    ("dataset=imagefolder dataset.root={folder}", "{folder} has no class folders", "dataset.root"),
    ("dataset=cifar10 dataset.root={folder} dataset.download=false", "{folder}/cifar-10-batches-py", "download=true"),
    ("dataset.rho=0.01", "dataset.rho=0.01", "[0.1, 1]"),
    ("loader.batch_size=100", "loader.batch_size=100", "64 or less"),
    ("negatives=patch negatives.smallest=80", "80 to 72 pixels", "negatives.smallest"),
    ("backbone=timm:nonexistent", "backbone.name=nonexistent", "timm.list_models()"),
    ("backbone=timm:resnet1", "backbone.name=resnet1", "did you mean resnet18"),
    ("backbone=timm:test_vit +backbone.options.foo=1", "test_vit", "foo"),
    ("backbone=resnet18 backbone.name=resnet19", "backbone.name=resnet19", "resnet18"),
    ("backbone.weights=/no/such", "backbone.weights=/no/such", ".safetensors"),
]


@pytest.mark.parametrize("case", IN_THE_WORLD, ids=lambda case: case[0])
def test_mistakes_about_the_world_are_answered_too(
    case: tuple[str, ...], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_: pytest.fail("training began"))
    empty = tmp_path / "empty"
    empty.mkdir()
    line, *parts = (text.replace("{folder}", str(empty)) for text in case)
    small = [] if line.startswith("dataset=") else DATA
    refused(command(*small, "loader.batch_size=8", *line.split()), *parts)
    # No config lies there, so the report takes the folder for no run.
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_sweep_goes_on_after_a_mistake(command: Command) -> None:
    seen: list[int] = []

    def job(config: DictConfig) -> float:
        seen.append(config.seed)
        if config.seed == 0:
            raise UserError("seed=0 is bad luck; take another.")
        return 1.0

    code, _, err = command("method=simclr", "-m", "seed=0,1,2", job=job)
    assert (code, err.splitlines(), seen) == (2, ["seed=0 is bad luck; take another."], [0, 1, 2])
    seen.clear()
    assert command("-m", "seed=1,2", job=job).code == 0


def test_a_fault_of_the_program_is_not_hidden(command: Command) -> None:
    def job(config: DictConfig) -> float:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command("seed=0", job=job)


def test_timm_models_have_a_short_name(command: Command) -> None:
    found: list[DictConfig] = []

    def job(config: DictConfig) -> float:
        found.append(config)
        return 0.0

    assert command("backbone=timm:vit_tiny_patch16_224.augreg_in21k", job=job).code == 0
    assert found[0].backbone.name == "vit_tiny_patch16_224.augreg_in21k"


def test_help_and_config_are_worth_reading(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command("--help")
    shown = capsys.readouterr().out
    for words in ("method: byol, moco, simclr", "python -m icl_msr.report", "temperature: 0.2"):
        assert words in shown
    code, shown, _ = command("--cfg", "job", "method=byol")
    assert code == 0
    assert "_target_: icl_msr.methods.BYOL" in shown


@pytest.mark.parametrize("word", ["method=mocco", pytest.param("method.temperature=-1", marks=pytest.mark.slow)])
def test_as_a_process(word: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "icl_msr.run", word, f"hydra.run.dir={tmp_path}"]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    refused(Answer(answer.returncode, answer.stdout, answer.stderr), word)
