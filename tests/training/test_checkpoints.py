"""Interrupted and continued = uninterrupted, to the last bit; signals save and leave."""

import math
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from support.tiny import dataset, trained

from icl_msr.core.errors import PREEMPTED
from icl_msr.training.checkpoints import Checkpoints
from icl_msr.training.online import OnlineEvaluation
from icl_msr.training.progress import Throughput

MSR = ("method=moco", "regularizer.every=2", "negatives=patch", "method.queue_size=20")
CASES = {
    "moco": MSR,
    "byol": ("method=byol", "regularizer.every=1"),
    "simclr, accumulated": ("method=simclr", "regularizer.every=1", "trainer.accumulate_grad_batches=2"),
    "moco, accumulated": (*MSR, "trainer.accumulate_grad_batches=3"),
    "a pass per epoch": ("method=moco", "regularizer.schedule=per_epoch"),
    "dropout": (
        *("method=simclr", "regularizer=none", "backbone=timm", "backbone.name=test_vit"),
        "+backbone.options.proj_drop_rate=0.5",
    ),
}
EPOCHS, BATCHES = 3, 5
WATCH: dict[str, Any] = {"every_n_epochs": 1, "seed": 0, "bank": 4000, "queries": 1000}


class Interrupt(pl.Callback):
    """A signal during a batch, counted from the start of training."""

    def __init__(self, batch: int, number: int = signal.SIGTERM) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * BATCHES + batch_idx == self.batch:
            os.kill(os.getpid(), self.number)


def fit(
    words: tuple[str, ...], file: Path, *more: pl.Callback, epochs: int = EPOCHS, every_n_minutes: float | None = None
) -> dict[str, Any]:
    """The checkpoint at the end of a training."""
    checkpoints = Checkpoints(file, every_n_epochs=1, every_n_minutes=every_n_minutes)
    watch = OnlineEvaluation(dataset(), 64 if "backbone=timm" in words else 128, **WATCH)
    trained(
        *words,
        callbacks=[checkpoints, Throughput(8), watch, *more],
        max_epochs=epochs,
        limit_train_batches=BATCHES,
        ckpt_path=file if file.exists() else None,
    )
    return load(file)


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the last bit, times apart."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "images", "elapsed"}:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            same(mine, theirs, f"{where}/{place}")
    else:
        assert one == other, where


@pytest.fixture(
    scope="module",
    params=[name if "moco, acc" in name else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Any]:
    """A command, and what it gives when nothing interrupts it."""
    words = CASES[request.param]
    return words, fit(words, tmp_path_factory.mktemp("whole") / "last.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What MoCo with MSR gives when nothing interrupts it."""
    return fit(MSR, tmp_path_factory.mktemp("whole") / "last.ckpt")


def the_same_training(whole: dict[str, Any], continued: dict[str, Any]) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch"):
        same(whole[part], continued[part], part)


@pytest.mark.parametrize("batch", [0, 4, 7, 14])
def test_interrupted_and_continued_is_uninterrupted(case: tuple[Any, Any], batch: int, tmp_path: Path) -> None:
    """In the middle of an epoch, at its end, at the very end: weights, moments, queue, strata, probe, counters."""
    words, whole = case
    file = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit) as stopped:
        fit(words, file, Interrupt(batch))
    assert stopped.value.code == PREEMPTED
    # With accumulation, it waits for the optimiser step.
    steps = load(file)["global_step"]
    assert steps < whole["global_step"] or batch == EPOCHS * BATCHES - 1
    the_same_training(whole, fit(words, file))


class Numbers(pl.Callback):
    """Keeps the regularizer's numbers of every step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        named = trainer.callback_metrics.items()
        self.seen[trainer.global_step] = {name: float(value) for name, value in named if name.startswith("msr/")}


def test_a_continued_run_logs_what_an_uninterrupted_one_logs(tmp_path: Path) -> None:
    """Also in a step in which the regularizer measures nothing."""
    whole, continued = Numbers(), Numbers()
    fit(MSR, tmp_path / "whole.ckpt", whole, epochs=1)
    with pytest.raises(SystemExit):
        fit(MSR, tmp_path / "last.ckpt", Interrupt(2), epochs=1)
    fit(MSR, tmp_path / "last.ckpt", continued, epochs=1)
    assert list(continued.seen) == [4, 5]
    assert continued.seen[4]
    assert continued.seen == {step: whole.seen[step] for step in (4, 5)}


class Break(pl.Callback):
    """The program ends where nobody expects it."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 3:
            raise RuntimeError("out of memory")


def test_checkpoints_by_the_clock(whole: dict[str, Any], tmp_path: Path) -> None:
    for minutes, batches in ((None, 5), (1e-9, 8)):
        file = tmp_path / str(batches) / "checkpoints" / "last.ckpt"
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(MSR, file, Break(), every_n_minutes=minutes)
        assert load(file)["global_step"] == batches
        the_same_training(whole, fit(MSR, file))


def test_more_epochs(tmp_path: Path) -> None:
    """With a constant learning rate, two epochs and one more are three."""
    words = (*MSR, "schedule=constant", "schedule.warmup_steps=0")
    whole = fit(words, tmp_path / "whole.ckpt")
    fit(words, tmp_path / "last.ckpt", epochs=2)
    continued = fit(words, tmp_path / "last.ckpt")
    same(whole["state_dict"], continued["state_dict"])


def test_more_epochs_stretch_the_schedule(tmp_path: Path) -> None:
    """The learning rate is that of the longer schedule at once, not where the shorter one ended."""

    class Rates(pl.Callback):
        seen: ClassVar[list[float]] = []

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(pl_module.learning_rate())

    words = ("method=simclr", "regularizer=none", "optimizer=sgd", "optimizer.lr=1.0")
    fit(words, tmp_path / "last.ckpt", epochs=1)
    fit(words, tmp_path / "last.ckpt", Rates(), epochs=2)
    assert Rates.seen == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(5, 10)])


def test_a_signal_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        fit(CASES["byol"], tmp_path / "run" / "checkpoints" / "last.ckpt", Interrupt(1, signal.SIGUSR1))
    assert stopped.value.code == PREEMPTED
    said = capsys.readouterr().err
    assert "Stopped by SIGUSR1 after 2 steps" in said
    assert f"resume={tmp_path}/run" in said
    assert before == (
        signal.getsignal(signal.SIGUSR1),
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
    )


def test_the_same_signal_at_once_is_one(tmp_path: Path) -> None:
    """SLURM signals a rank and its parent, which passes the signal on."""
    with pytest.raises(SystemExit) as stopped:
        fit(CASES["byol"], tmp_path / "last.ckpt", Interrupt(1), Interrupt(1))
    assert stopped.value.code == PREEMPTED
    assert load(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        fit(CASES["byol"], tmp_path / "last.ckpt", Interrupt(1), Interrupt(1, signal.SIGINT))
    assert stopped.value.code == 128 + signal.SIGINT
    assert not (tmp_path / "last.ckpt").exists()
