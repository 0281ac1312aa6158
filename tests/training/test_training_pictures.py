"""Pictures and histograms of gradients while a run trains: seen on dashboards, and nothing else changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.image import imread
from pytorch_lightning.loggers.logger import DummyLogger
from support.programs import same
from support.tiny import dataset, trained

from icl_msr.training.gradients import Gradients
from icl_msr.training.loggers import Dashboard, Picture
from icl_msr.training.pictures import Pictures

WORDS = ("method=moco", "negatives=patch", "regularizer.every=1")


class Board(DummyLogger):
    """A dashboard that keeps the size of pictures, and histograms, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[tuple[int, dict[str, Any]]] = []
        self.values: list[tuple[int, Mapping[str, Any]]] = []

    def show(self, pictures: Mapping[str, Picture], step: int) -> None:
        self.pictures.append((step, {name: imread(picture.file).shape[2] for name, picture in pictures.items()}))

    def histograms(self, values: Mapping[str, Any], step: int) -> None:
        self.values.append((step, values))

    def conclude(self, folder: Path) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


def test_what_is_shown_does_not_change_the_training() -> None:
    board = Board()
    assert isinstance(board, Dashboard)
    watching = [Pictures(dataset(), every_n_epochs=2), Gradients(every_n_steps=3)]
    watched, _ = trained(*WORDS, callbacks=watching, logger=board, max_epochs=4)  # of two steps each
    alone, _ = trained(*WORDS, max_epochs=4)
    same(watched.state_dict(), alone.state_dict())
    names = {f"pictures/{name}" for name in ("views", "negatives", "strata", "weights")}
    assert board.pictures == [(step, dict.fromkeys(names, 4)) for step in (3, 7)]
    assert [step for step, _ in board.values] == [2, 5]
    trainable = {f"gradients/{name}" for name, p in watched.method.named_parameters() if p.requires_grad}
    assert all(values.keys() == trainable for _, values in board.values)
    assert any(np.abs(values).max() > 0 for values in board.values[0][1].values())


def test_gradients_that_are_not_finite_are_left_out() -> None:
    class Spoiled(Gradients):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            first, second = [p for p in pl_module.method.parameters() if p.grad is not None][:2]
            first.grad.flatten()[0] = torch.nan
            second.grad.fill_(torch.inf)
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    board = Board()
    spoiled = [Spoiled(every_n_steps=1)]
    module, _ = trained("method=simclr", "regularizer=none", callbacks=spoiled, logger=board, limit_train_batches=1)
    ((_, values),) = board.values
    named = {f"gradients/{name}": p.numel() for name, p in module.method.named_parameters() if p.requires_grad}
    first, second, *others = named
    assert len(values[first]) == named[first] - 1
    assert second not in values
    assert all(len(values[name]) == named[name] for name in others)
