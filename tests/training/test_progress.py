"""Speed is counted without what is not training, and an epoch has its line."""

import re
import time
from typing import Any

import pytest
import pytorch_lightning as pl
from support.tiny import AfterBatch, trained

from icl_msr.training.progress import EpochLines, Throughput

WORDS = ("method=simclr", "regularizer=none")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless it is moved."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Time(pl.Callback):
    """A batch takes 2 s, the first one 50 s, and what follows an epoch 1000 s."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.batches = clock, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock[0] += 2.0 if self.batches else 50.0
        self.batches += 1

    def on_train_epoch_end(self, *_: Any) -> None:
        self.clock[0] += 1000.0


def test_throughput_leaves_out_the_first_batch_and_evaluations(clock: list[float]) -> None:
    throughput = Throughput(8)
    assert throughput.rate == 0
    _, trainer = trained(*WORDS, callbacks=[Time(clock), throughput], max_epochs=3, limit_train_batches=4)
    assert throughput.images == 8 * 11
    assert throughput.seconds == pytest.approx(22)
    assert throughput.rate == pytest.approx(4)
    assert float(trainer.callback_metrics["images_per_second"]) == pytest.approx(4)


def test_micro_batches_count_too(clock: list[float]) -> None:
    throughput = Throughput(8)
    words = (*WORDS, "trainer.accumulate_grad_batches=2")
    trained(*words, callbacks=[Time(clock), throughput], limit_train_batches=8)
    assert throughput.rate == pytest.approx(4)
    assert throughput.images >= 8 * 5


def test_a_line_an_epoch(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    throughput = Throughput(8)
    log = AfterBatch(lambda module: module.log("online/knn", 0.5))
    callbacks = [Time(clock), log, throughput, EpochLines(throughput)]
    trained(*WORDS, callbacks=callbacks, max_epochs=2, limit_train_batches=2)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1/2   loss \d\.\d{3}   knn 50\.0 %   4 images/s   0:17:32 left", first)
    assert second.startswith("epoch 2/2 ")
    assert second.endswith(" 0:00:00 left")


def test_a_line_says_nothing_of_a_loss_that_is_not_logged_yet(capsys: pytest.CaptureFixture[str]) -> None:
    trained(*WORDS, callbacks=[EpochLines(Throughput(8))], log_every_n_steps=10)
    assert re.fullmatch(r"epoch 1/1   0 images/s   0:00:00 left\n", capsys.readouterr().out)
