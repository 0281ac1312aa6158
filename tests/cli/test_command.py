"""Mistakes on the command line: exit code 2, one sentence that names the key and a way out, and nothing written.

`PYTHONPATH=tests python tests/cli/test_command.py` prints the table: every wrong command line and its sentence.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir, nullcontext
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from PIL import Image
from support.inprocess import Answer, execute
from support.tiny import DATA, MODEL

from icl_msr.cli import assemble, job
from icl_msr.core.config import Settings
from icl_msr.core.errors import UserError
from icl_msr.core.folder import FORMAT
from icl_msr.training.module import Pretraining

Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return execute


def refused(answer: Answer, *parts: str) -> None:
    assert answer.code == 2
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert all(part in line for part in parts), line
    assert line[-1] in ".?'"


BEFORE_ANYTHING_IS_BUILT = [
    # names
    ("method=mocco", "method=mocco", "did you mean moco"),
    ("negatives=path", "negatives=path", "patch"),
    ("method=null", "method=null", "choose one of", "moco"),
    ("method=", "method=", "choose one of", "moco"),
    ("experiment=cifar10/simcl", "experiment=cifar10/simcl", "cifar10/simclr"),
    ("hydra/launcher=ray", "hydra/launcher=ray", "process, serial", "pip install hydra-ray-launcher"),
    ("hydra.searchpath=[pkg://nothere.conf] method=mine", "hydra.searchpath", "pkg://nothere.conf"),
    ("hydra.searchpath=[file:///no/such]", "hydra.searchpath", "file:///no/such"),
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
    ("optimizer.foreach=true", "optimizer.foreach", "if torch.optim.Adam has it", "+optimizer.foreach=<value>"),
    ("+seed=1", "seed", "leave the plus out"),
    ("++trainer.max_epoch=3", "trainer.max_epoch", "of Trainer; did you mean max_epochs"),
    ("+trainer.max_epoch=3", "trainer.max_epoch", "of Trainer; did you mean max_epochs"),
    ("trainer.devices=2", "trainer.devices", "type hardware.devices=<number>"),
    ("+trainer.logger=true", "trainer.logger", "type logger=[wandb,tensorboard]"),
    (
        "optimizer._target_=torch.optim.SGD +optimizer.momentun=0.9",
        "optimizer.momentun",
        "of SGD; did you mean momentum?",
    ),
    ("+callbacks.lr={_target_:pytorch_lightning.callbacks.LearningRateMonitor,x:1}", "callbacks.lr.x", "log_momentum"),
    ("method.temperature=${foo}", "method.temperature", "'foo' not found", "${seed}"),
    ("seed=${oc.env:NOT_THERE}", "seed cannot be filled in", "'NOT_THERE' not found"),
    ("hydra.run.dir=${foo}", "hydra.run.dir", "'foo' not found"),
    ("method._target_=icl_msr.nothing", "method._target_=icl_msr.nothing"),
    ("method._target_=icl_msr.training.optimization.Optimization", "method.", "is missing"),
    # values
    ("method.temperature=-1", "method.temperature=-1", "greater than 0"),
    ("method.hidden_dim={_target_:builtins.object}", "method.hidden_dim", "should be a whole number"),
    ("~bias_and_norm loader.batch_size=-1", "loader.batch_size=-1", "at least 2"),
    ("trainer.max_epochs=abc", "trainer.max_epochs", '"abc"', "a whole number"),
    ("trainer.gradient_clip_val=abc", "trainer.gradient_clip_val", "a number or null"),
    ("trainer=3", "trainer=3 does not exist", "choose one of default"),
    ("regularizer.weights=foo", "regularizer.weights", "meta, uniform_only, random, random_net, ones or joint"),
    ("regularizer.width=12", "regularizer.width=12", "a multiple of 8"),
    ("loader.batch_size=1", "loader.batch_size=1", "at least 2"),
    ("seed=-1", "seed=-1", "at least 0"),
    ("optimizer.lr=inf", "optimizer.lr=Infinity", "a finite number"),
    ("dataset.rho=2", "dataset.rho=2", "at most 1"),
    ("dataset.cache=3", "dataset.cache=3", "text or null"),
    ("hardware.channels_last=maybe", "hardware.channels_last", "true or false"),
    ("evaluation.knn=[foo]", "evaluation.default.knn.0", '"foo"', "wmse, icl, instdisc or dino"),
    ("evaluation.learning_rates=[]", "evaluation.default.learning_rates=[]", "1 or more"),
    ("augment.scale=[0.5,0.2]", "augment.scale=[0.5, 0.2]", "must not be larger"),
    ("augment.scale=[0.5]", "augment.scale=[0.5]", "2 or more"),
    ("augment.views=[{blurr:1}]", "augment.views.0", "'blurr'", "blur"),
    ("augment.views=[{blur:2}]", "augment.views.0.blur=2", "at most 1"),
    ("augment.views=3", "augment.views=3", "a list"),
    # words
    ("a b", "a b", "key=value"),
    ("method.temperature=[1", "method.temperature=[1", "key=value"),
    ("method.temperature=a=b", "cannot be read", """method.temperature='"a=b"'"""),
    ("dataset.root=/a(1)", "cannot be read", """dataset.root='"/a(1)"'"""),
    ("dataset.root=/o'b", "cannot be read", """dataset.root='"/o'"'"'b"'"""),
    ("dataset.root=/a,b", "has several values", "add -m", """dataset.root='"/a,b"'"""),
    ("seed=0,1", "seed=0,1", "add -m"),
    ("evaluation=light,default", "has several values", "evaluation=[light,default]", "add -m"),
    ("evaluation=[light,mocco]", "evaluation=mocco does not exist", "choose one of"),
    ("evaluation=[light,corruptions] evaluation.imags=3", "evaluation.corruptions.imags", "corruptions.images"),
    ("-m evaluation=corruptions,default evaluation.images=0", "evaluation.corruptions.images=0", "greater than 0"),
    ("-m seed=0,1 evaluation.imags=3", "evaluation.default.imags", "is not a key"),
    ("augment=[small,colour]", "augment=[small,colour]", "augment takes one"),
    ("--seed=3", "--seed=3", "seed=<value>"),
    ("--multi seed=1,2", "--multi is not an option"),
    ("--package x", "--package", "--cfg job"),
    ("--cfg job --info", "Only one of"),
    ("--experimental-rerun x", "can execute code", "resume=FOLDER"),
    ("-sc", "Expecting one subcommand"),
    # Hydra's own keys
    ("hydra.run.dir=s3://bucket/run", "hydra.run.dir=s3://bucket/run is a URL", "local folders"),
    ("-m seed=0,1 hydra.sweep.dir=gs://bucket/runs", "hydra.sweep.dir=gs://bucket/runs is a URL"),
    ("-m hydra.launcher=null", "Hydra launcher is not configured"),
    ("-m hydra.sweeper=null", "Hydra sweeper is not configured"),
    ("hydra.mode=FOO", "hydra.mode cannot be set", "[RUN, MULTIRUN]"),
    ("hydra.job=null", "hydra.job cannot be set", "not Optional"),
    # sizes and kinds that nothing can have
    ("seed=4294967296", "seed=4294967296", "less than 4294967296"),
    ("regularizer.seed=-1", "regularizer.seed=-1", "at least 0"),
    ("dataset.train=99999999999999999999", "dataset.train=99999999999999999999", "at most 64 bits"),
    ("seed=²", "cannot be read", """seed='"²"'"""),
    ("+method.temperature={²:1}", "cannot be read"),
    ("logger._target_=builtins.int", "logger.wandb._target_=builtins.int", "does not name its parameters"),
    ("+callbacks.mine={_target_:builtins.max}", "callbacks.mine._target_=builtins.max", "choose a class or a function"),
    ("--cfg foo", "--cfg", "'job'"),
    # several words
    ("dataset=arrays", "dataset.path", "add dataset.path=<value>"),
    ("dataset=arrays dataset.path=3", "dataset.path=3", "text or a list"),
    ("dataset=arrays dataset.path=[]", "dataset.path=[]", "a list of 1 or more"),
    ("regularizer=none regularizer.lam=1", "regularizer.lam", "regularizer is none"),
    ("regularizer=none +regularizer.lam=1", "regularizer.lam", "regularizer is none"),
    ("evaluation=none +evaluation.knn=[dino]", "evaluation.knn", "evaluation is none"),
    ("backbone=timm:resnet18 backbone.options={foo:1}", "backbone.options.foo", "+backbone.options.foo"),
    ("-m method=simclr,mocco", "method=mocco", "did you mean moco"),
    ("method.temprature=0.2 -m seed=0,1", "method.temprature", "method.temperature"),
    ("-m method.temperature=0.1,-1", "method.temperature=-1", "greater than 0"),
    ("-m hydra/launcher=process seed=-1,-2", "seed=-1", "at least 0"),
]


@pytest.mark.parametrize("case", BEFORE_ANYTHING_IS_BUILT, ids=lambda case: case[0])
def test_mistakes_are_answered_before_anything_is_built(
    case: tuple[str, ...], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "build", lambda node, *_: pytest.fail(f"{node} was built"))
    line, *parts = case
    refused(command(*split(line)), *parts)
    assert not list(tmp_path.iterdir())


def split(line: str) -> list[str]:
    return [line] if line == "a b" else line.split()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("crater",)


def make_world(folder: Path) -> None:
    """A folder with all that can be wrong in it, and one run that is not."""
    with chdir(folder):
        Path("empty").mkdir()
        Path("file").write_text("Nothing.")
        make_images()
        make_arrays()
        done = execute(*SMALL, "trainer.max_epochs=2", "hydra.run.dir=run")
        assert done.code == 0, done.err
        make_runs()


def make_images() -> None:
    for number in range(8):
        file = Path("photos") / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 24), number + 1).save(file)
    for copy in ("hollow", "cut", "foreign"):
        shutil.copytree("photos", copy)
    Path("hollow/c").mkdir()
    os.truncate("cut/a/0.png", 200)
    Path("foreign/a/0.png").write_text("no image")
    for shape, texture in (("cat", "dog"), ("dog", "cat")):
        Path("stimuli", shape).mkdir(parents=True)
        shutil.copy("photos/a/0.png", Path("stimuli", shape, f"{shape}1-{texture}1.png"))
    Path("photos/boxes.csv").write_bytes(b"\xff\xfe\0")


def make_arrays() -> None:
    images, labels = np.zeros((16, 8, 8, 3), np.uint8), np.arange(16) % 2
    good = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez("shape.npz", **{**good, "train_images": images[..., :2]})
    np.savez("floats.npz", **{**good, "test_images": images / 255})
    np.savez("unlabelled.npz", **{key: array for key, array in good.items() if key != "train_labels"})
    np.savez("objects.npz", **{**good, "classes": np.array([Bomb()])})
    np.savez("short.npz", **good)
    os.truncate("short.npz", 900)


def make_runs() -> None:
    """The run, interrupted, with a file of it spoilt."""
    checkpoint: dict[str, Any] = torch.load("run/checkpoints/last.ckpt")
    weights = checkpoint["state_dict"]
    config = Path("run/config.yaml").read_text()
    half = {name: weights[name] for name in list(weights)[::2]}
    contents: dict[str, Any] = {
        "bomb": {**checkpoint, "callbacks": Bomb()},
        "other-program": {"state_dict": {"w": torch.ones(1)}},
        "other-network": {**checkpoint, "state_dict": half},
        "weights-only": {key: value for key, value in checkpoint.items() if key != "optimizer_states"},
        "cut-short": None,
        "locked": None,
        "no-yaml": "seed: [1\nmethod: }",
        "binary": bytes(range(256)),
        "latin": "seed: 0 # caf\xe9".encode("latin1"),
        "list": "- 1",
        "nothing": "",
        "loose": config.replace("seed: 0", "seed: ${nothing}", 1),
        "old": None,
        "future": None,
    }
    for name, content in contents.items():
        shutil.copytree("run", name)
        Path(name, "results.json").unlink()
        if isinstance(content, dict):
            torch.save(content, Path(name, "checkpoints", "last.ckpt"))
        elif content is not None:
            Path(name, "config.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    os.truncate("cut-short/checkpoints/last.ckpt", 1000)
    facts = json.loads(Path("run/environment.json").read_text())
    Path("future/environment.json").write_text(json.dumps({**facts, "format": FORMAT + 1, "icl_msr": "9.1.0"}))
    Path("old/environment.json").write_text(json.dumps({**facts, "format": None, "icl_msr": "0.1.0"}))
    fcntl.flock(os.open("locked", os.O_RDONLY), fcntl.LOCK_EX)  # until this process ends


SMALL = [*DATA, *MODEL, "trainer.limit_train_batches=1", "evaluation=none", "logger=csv", "hardware=cpu"]
DAMAGED = ("config.yaml is damaged", "begin a new run")
CHECKPOINT = "checkpoints/last.ckpt"
FULL = patch("shutil.disk_usage", return_value=SimpleNamespace(free=10_000))
SITUATIONS = {"hydra.run.dir=full": FULL, "resume=locked": patch("icl_msr.core.folder.PATIENCE", 0.0)}
IN_THE_WORLD = [
    # data
    ("dataset=arrays dataset.path=shape.npz", "train_images", "(16, 8, 8, 2)", "uint8 (N, H, W, 3)"),
    ("dataset=arrays dataset.path=unlabelled.npz", "has no array train_labels"),
    ("dataset=imagefolder dataset.root=nowhere", "There is no folder nowhere", "dataset.root"),
    ("dataset=imagefolder dataset.root=hollow", "hollow/c has no images", "remove it"),
    ("dataset=imagefolder dataset.root=cut", "cut/a/0.png cannot be read as an image", "Truncated", "replace"),
    ("dataset=imagefolder dataset.root=~/photos", "There is no folder /proc/me/photos"),
    ("dataset=arrays dataset.path=[~/a.npz,'~/b.npz']", "There is no file /proc/me/a.npz"),
    ("backbone.weights=~/a.safetensors", "backbone.weights=/proc/me/a.safetensors"),
    ("hydra.run.dir=~/run seed=5", "/proc/me cannot be written"),
    ("resume=~/run", "resume=/proc/me/run is not a run"),
    ("resume='~/run'", "resume=/proc/me/run is not a run"),
    # models and batches
    ("loader.batch_size=100", "loader.batch_size=100", "64 or less"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0", "at least 1"),
    ("dataset.image_size=10000000", "images of 10000000 pixels", "GB of memory", "fewer or smaller"),
    ("dataset.train=1000000000000000", "1000000000000112 images", "GB of memory"),
    ("method.queue_size=1000000000000", "A queue of 1000000000000 keys", "GB of memory", "a smaller method.queue_size"),
    ("method.hidden_dim=1000000000000", "more memory than there is", "smaller sizes"),
    ("method.hidden_dim=1000000000000000000", "more memory than there is", "smaller sizes"),
    ("+logger.mine={_target_:builtins.object}", "builtins.object is not of the kind Logger"),
    ("+callbacks.mine={_target_:builtins.object}", "builtins.object is not of the kind Callback"),
    ("~augment +augment={_target_:builtins.object}", "builtins.object is not of the kind Augmentation"),
    ("~regularizer +regularizer={_target_:builtins.object}", "builtins.object is not of the kind Regularizer"),
    ("~negatives +negatives={_target_:builtins.object}", "builtins.object has no alpha"),
    ("~hardware +hardware={_target_:null}", "null is not of the kind Hardware"),
    ("+evaluation.mine={_target_:builtins.object}", "builtins.object is not of the kind Measures"),
    ("augment.size=20000", "Views of 20000 pixels", "GB of memory"),
    ("dataset.cache=s3://bucket/cache", "dataset.cache=s3://bucket/cache is a URL"),
    ("loader.batch_size=16 method.queue_size=12", "method.queue_size=12", "one batch", "16 or more"),
    ("loader.batch_size=16 method=wmse method.embedding_dim=8 method.whitening_size=32", "more than the 16 images"),
    ("method=moco augment.views=[{},{},{}]", "augment.views lists 3 views", "MoCo takes 2"),
    ("evaluation=shape evaluation.stimuli=stimuli evaluation.head=true", "evaluation.head=true", "encoder=timm:NAME"),
    ("metric=accuracy", "metric=accuracy will not be measured", "online/knn"),
    ("metric=online/knn ~callbacks.online", "metric=online/knn will not be measured", "auto"),
    # machines
    ("hardware.accelerator=gpu hardware.devices=99", "99 GPU", "hardware=cpu"),
    ("hardware=ddp hardware.accelerator=cpu loader.batch_size=9", "loader.batch_size=9", "2 devices", "8"),
    ("hardware=ddp hardware.nodes=2", "hardware.nodes=2", "torchrun"),
    # folders
    ("hydra.run.dir=file/run", "file/run cannot be written", "another hydra.run.dir"),
    ("hydra.run.dir=/proc/self", "/proc/self cannot be written", "another hydra.run.dir"),
    ("-m hydra.sweep.dir=file seed=0,1", "file cannot be written", "another hydra.sweep.dir"),
    ("hydra.run.dir=full", "full is full", "0 MB are free", "another hydra.run.dir"),
    ("hydra.run.dir=run seed=5", "run holds a run with", "another hydra.run.dir"),
    ("hydra.run.dir=no-yaml", "no-yaml/config.yaml is damaged"),
    # runs to go on with
    ("resume=empty", "resume=empty is not a run", "config.yaml"),
    ("resume=nowhere", "resume=nowhere is not a run"),
    ("resume=run seed=1", "seed=1 cannot be changed", "trainer.max_epochs"),
    ("resume=run method=simclr trainer.max_epochs=3", "method=simclr cannot be changed"),
    ("resume=run trainer.max_epochs=1", "trainer.max_epochs=2, and 1 was asked for", "may grow"),
    ("resume=run trainer.max_epochs=many", "trainer.max_epochs", "a whole number"),
    ("resume=cut-short", f"cut-short/{CHECKPOINT} is damaged", "a copy"),
    ("resume=bomb", f"bomb/{CHECKPOINT} could execute code", "not loaded"),
    ("resume=other-program", f"other-program/{CHECKPOINT} is not a checkpoint of icl_msr"),
    ("resume=other-network", f"other-network/{CHECKPOINT} belongs to another config"),
    ("resume=weights-only", f"weights-only/{CHECKPOINT} holds no state of the optimiser", "backbone.weights"),
    ("resume=old", "old does not say its format", "reads format 2", "use icl-msr 0.1.0"),
    ("resume=future", "future has format 3", "reads format 2", "use icl-msr 9.1.0"),
    ("hydra.run.dir=future", "future has format 3", "reads format 2"),
    ("backbone.weights=future", "future has format 3", "reads format 2"),
    ("evaluation=similarity evaluation.other=old", "old does not say its format"),
    ("resume=locked", "locked is being written by another process"),
    *((f"resume={name}", name, *DAMAGED) for name in ("no-yaml", "binary", "latin", "list", "nothing", "loose")),
]

OTHERS_IN_THE_WORLD = [
    ("dataset=arrays dataset.path=no.npz", "no.npz", "dataset.path"),
    ("dataset=arrays dataset.path=empty", "cannot be read as .npz", "numpy.savez"),
    ("dataset=arrays dataset.path=file", "cannot be read as .npz", "numpy.savez"),
    ("dataset=arrays dataset.path=short.npz", "cannot be read as .npz", "numpy.savez"),
    ("dataset=arrays dataset.path=objects.npz", "cannot be read as .npz without pickles", "numpy.savez"),
    ("dataset=arrays dataset.path=floats.npz", "test_images", "float64", "uint8 (N, H, W, 3)"),
    ("dataset=imagefolder dataset.root=file", "There is no folder file", "dataset.root"),
    ("dataset=imagefolder dataset.root=empty", "empty has no class folders", "dataset.root"),
    ("dataset=imagefolder dataset.root=foreign", "foreign/a/0.png is not an image", "replace"),
    ("dataset=imagefolder dataset.root=photos dataset.tests=[c]", "There is no folder photos/c", "dataset.tests"),
    ("dataset=imagefolder dataset.root=photos dataset.boxes=boxes.csv", "boxes.csv lacks the columns", "xmin"),
    ("dataset=imagefolder dataset.root=photos dataset.train_on=fg", "dataset.train_on=fg", "dataset.boxes"),
    ("dataset=coco dataset.root=photos", "There is no file photos/annotations/instances_train2017.json", "train_annot"),
    ("dataset=coco dataset.root=photos dataset.classes=1", "dataset.classes=1 is not allowed", "at least 2"),
    ("dataset=cifar10 dataset.root=empty dataset.download=false", "empty/cifar-10-batches-py", "download=true"),
    ("dataset.rho=0.01", "dataset.rho=0.01", "[0.1, 1]"),
    ("dataset.cache=file", "dataset.cache=file cannot be written", "dataset.cache=null"),
    ("negatives=patch negatives.smallest=80", "80 to 72 pixels", "negatives.smallest"),
    ("backbone=timm:nonexistent", "backbone.name=nonexistent", "timm.list_models()"),
    ("backbone=timm:resnet1", "backbone.name=resnet1", "did you mean resnet18"),
    ("backbone=timm:test_vit +backbone.options.foo=1", "test_vit", "foo"),
    ("backbone=resnet18 backbone.name=resnet19", "backbone.name=resnet19", "resnet18"),
    ("backbone.weights=/no/such", "backbone.weights=/no/such", ".safetensors"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def in_the_world(line: str) -> Answer:
    chosen = [group for group in ("dataset", "evaluation") if f"{group}=" in line]
    small = [word for word in SMALL if not any(word.startswith((f"{group}.", f"{group}=none")) for group in chosen)]
    with SITUATIONS.get(line, nullcontext()):
        return execute(*([] if line.startswith("resume=") else small), *line.split())


@pytest.mark.parametrize(
    "case",
    [*IN_THE_WORLD, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS_IN_THE_WORLD)],
    ids=lambda case: case[0],
)
def test_mistakes_about_the_world_are_answered_too(
    case: tuple[str, ...], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("training began"))
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", "/proc/me")

    def content() -> dict[Path, int | None]:
        return {path: path.stat().st_mtime_ns if path.is_file() else None for path in world.rglob("*")}

    before = content()
    line, *parts = case
    refused(in_the_world(line), *parts)
    assert content() == before


def test_a_sweep_without_jobs_is_a_mistake(command: Command) -> None:
    for word in ("seed=glob(*)", "method=glob(zz*)"):
        code, _, err = command("-m", word)
        assert (code, err) == (
            2,
            "The sweep has no jobs, because a list or a pattern in it gives no values; write them out.\n",
        )
    assert not list(Path.cwd().iterdir())


def test_a_package_that_is_not_there(command: Command) -> None:
    refused(Answer(*command("--cfg", "job", "--package", "x")[:1], "", "package 'x' not found in config."), "x")


def test_names_are_printed_as_typed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may look like the markup or the emoji of rich."""
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: sys.exit(0))
    folder = Path("exp [final] :smile: [/] é").resolve()
    code, out, err = command(*SMALL, f"hydra.run.dir='{folder}'")
    assert (code, out.splitlines()[-1], err) == (0, str(folder), "")


def test_a_folder_that_was_there_stays(command: Command) -> None:
    Path("mine").mkdir()
    refused(command("seed=-1", "hydra.run.dir=mine"), "seed=-1")
    refused(command("seed=-1", "hydra.run.dir=mine/ours/run"), "seed=-1")
    refused(command("seed=-1", "hydra.run.dir=mine/ours/run", "hydra.output_subdir=.hydra"), "seed=-1")
    refused(command("-m", "method=moco,mocco", "hydra.sweep.dir=mine/ours/sweep"), "method=mocco")
    assert list(Path.cwd().rglob("*")) == [Path.cwd() / "mine"]


def test_devices_in_a_sweep_need_processes(command: Command) -> None:
    """Said once, and no job leaves anything."""
    code, _, err = command(*SMALL, "-m", "hardware=ddp", "seed=0,1,2")
    (line,) = err.splitlines()
    assert (code, "add hydra/launcher=process" in line) == (2, True)
    assert {path.name for path in Path.cwd().rglob("*") if path.is_file()} == {"sweep.json", "multirun.yaml"}


def test_what_was_trained_outlives_a_failure_after_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the disk is full, once the program is at fault; the same command goes on."""
    words = [*SMALL, "trainer.max_epochs=1", "~callbacks.online", "hydra.run.dir=run"]
    run_folder, usual = Path("run").resolve(), Path.open

    def full(path: Path, *arguments: Any, **keys: Any) -> Any:
        """Say what the kernel says of a full disk, where the results are written."""
        return FileIO("/dev/full", "w") if path.name == ".results.json.tmp" else usual(path, *arguments, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        code, _, err = command(*words)
    kept = "the previous results.json, if any, is kept"
    assert (code, err) == (
        2,
        f"The disk of {run_folder} is full; {kept}: free space and continue with resume={run_folder}.\n",
    )
    assert not Path("run/results.json").exists()
    trained = Path("run", CHECKPOINT).read_bytes()

    def fails(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Pretraining, "training_step", lambda *_: pytest.fail("trained again"))
    with patch.object(job, "evaluate", fails), pytest.raises(RuntimeError, match="a bug") as fault:
        command(*words)
    assert fault.value.__notes__ == [f"What was trained is kept; continue with resume={run_folder}."]
    code, _, err = command(*words)
    assert (code, err) == (0, "")
    assert Path("run/results.json").exists()
    assert Path("run", CHECKPOINT).read_bytes() == trained


def test_a_sweep_goes_on_after_a_mistake(command: Command) -> None:
    seen: list[int] = []

    def job(settings: Settings, config: DictConfig) -> float:
        seen.append(config.seed)
        if config.seed == 0:
            raise UserError("seed=0 is bad luck; take another.")
        return 1.0

    code, _, err = command("method=simclr", "-m", "seed=0,1,2", job=job)
    assert (code, err.splitlines(), seen) == (2, ["seed=0 is bad luck; take another."], [0, 1, 2])
    seen.clear()
    assert command("-m", "seed=1,2", job=job).code == 0


def test_a_fault_of_the_program_is_not_hidden(command: Command) -> None:
    def job(settings: Settings, config: DictConfig) -> float:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command("seed=0", job=job)


def test_timm_models_have_a_short_name(command: Command) -> None:
    found: list[DictConfig] = []

    def job(settings: Settings, config: DictConfig) -> float:
        found.append(config)
        return 0.0

    assert command("backbone=timm:vit_tiny_patch16_224.augreg_in21k", job=job).code == 0
    assert found[0].backbone.name == "vit_tiny_patch16_224.augreg_in21k"


def test_help_and_config_are_worth_reading(command: Command) -> None:
    code, shown, _ = command("--help")
    assert code == 0
    for words in ("method: ", "simclr", "python -m icl_msr.report", "temperature: 0.2"):
        assert words in shown
    code, shown, _ = command("seed=3", "--cfg", "job", "method=byol")
    assert code == 0
    assert "_target_: icl_msr.methods.BYOL" in shown


def test_a_terminal_that_knows_ascii_alone(tmp_path: Path) -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    for module, *words in (("icl_msr.run", "method=é"), ("icl_msr.report", "é"), ("icl_msr.run", "--help")):
        line = [sys.executable, "-m", module, *words]
        answer = subprocess.run(line, capture_output=True, text=True, check=False, env=plain, cwd=tmp_path)
        if words == ["--help"]:
            assert (answer.returncode, answer.stderr) == (0, "")
        else:
            refused(Answer(answer.returncode, answer.stdout, answer.stderr), "\\")


@pytest.mark.parametrize("word", ["method=mocco", pytest.param("method.temperature=-1", marks=pytest.mark.slow)])
def test_as_a_process(word: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "icl_msr.run", word, f"hydra.run.dir={tmp_path}"]
    answer = subprocess.run(line, capture_output=True, text=True, check=False)
    refused(Answer(answer.returncode, answer.stdout, answer.stderr), word)


def print_table() -> None:
    """Every wrong command line and its answer."""
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder))
        with chdir(folder):
            for line, *_ in BEFORE_ANYTHING_IS_BUILT:
                print_answer(line, execute(*split(line)))
            for line, *_ in [*IN_THE_WORLD, *OTHERS_IN_THE_WORLD]:
                print_answer(line, in_the_world(line))


def print_answer(line: str, answer: Answer) -> None:
    said = answer.err.replace(f"{Path.cwd()}/", "")
    print(f"$ python -m icl_msr.run {line}\n{answer.code}: {said}", flush=True)


if __name__ == "__main__":
    print_table()
