"""The callback that writes the checkpoint of a run and ends the run on a signal."""

import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pydantic import PositiveFloat, PositiveInt
from pytorch_lightning.callbacks import Checkpoint
from typing_extensions import override

from icl_msr.core.distributed import world_size
from icl_msr.core.errors import PREEMPTED
from icl_msr.core.folder import RunFolder
from icl_msr.core.signals import give_back, take_signals
from icl_msr.training.progress import last_epoch


class Checkpoints(Checkpoint):
    """Keeps one checkpoint, always of the last complete optimiser step.

    It is written every few epochs, every few minutes, at the end, and on a signal (Ctrl-C, SIGTERM, SLURM's SIGUSR1, or
    SIGHUP of a terminal that is closed).
    After a signal the run ends with exit code 75. A second signal ends it at once. The same signal within a second does
    not count as a second one, because SLURM signals a rank and also its parent, and the parent passes the signal on.

    Lightning calls a `Checkpoint` after all other callbacks, so the checkpoint has their latest state.
    """

    def __init__(self, checkpoint: Path, *, every_n_epochs: PositiveInt, every_n_minutes: PositiveFloat | None):
        self.file, self.every_n_epochs, self.every_n_minutes = checkpoint, every_n_epochs, every_n_minutes
        self.signal: signal.Signals | None = None
        self._signalled_at = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved_at = time.monotonic()
        self._stop = False
        self._ended = False

    @override
    def state_dict(self) -> dict[str, Any]:
        # A run that a callback such as early stopping has ended must end again at once.
        return {"ended": self._ended}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ended = state_dict["ended"]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # These handlers replace Lightning's, which calls a collective at any point of the program.
        trainer.should_stop |= self._ended
        self._saved_at = time.monotonic()
        self._handlers = take_signals(self._note)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Writes only between two optimiser steps. The last batch of an epoch is left to the end of the epoch.
        # Only Lightning's loop knows whether gradients are being accumulated.
        loop = trainer.fit_loop.epoch_loop
        if not (loop.batch_progress.is_last_batch or loop._should_accumulate()):
            minutes = (time.monotonic() - self._saved_at) / 60
            self._save(trainer, due=self.every_n_minutes is not None and minutes >= self.every_n_minutes)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, due=(trainer.current_epoch + 1) % self.every_n_epochs == 0 or last_epoch(trainer))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has logged the numbers of the last step only now.
        self._leave_if_told(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The handlers that were there before come back.
        self._give_signals_back()
        self._leave_if_told(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._give_signals_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._signalled_at = signal.Signals(number), time.monotonic()
        elif number != self.signal or time.monotonic() - self._signalled_at > 1.0:
            sys.exit(128 + number)

    def _give_signals_back(self) -> None:
        give_back(self._handlers)
        self._handlers = {}

    def _save(self, trainer: pl.Trainer, due: bool) -> None:
        """Write a checkpoint if one is due or a signal has come on any rank. A `fast_dev_run` writes nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        decision = torch.tensor([due, self.signal is not None], dtype=torch.int32, device=trainer.strategy.root_device)
        if world_size() > 1:
            dist.all_reduce(decision, dist.ReduceOp.MAX)
        due, self._stop = decision.bool().tolist()
        if due or self._stop:
            self._ended = trainer.should_stop
            trainer.save_checkpoint(self.file)
            self._saved_at = time.monotonic()

    def _leave_if_told(self, trainer: pl.Trainer) -> None:
        if not self._stop:
            return
        if trainer.is_global_zero:
            cause = self.signal.name if self.signal else "a signal to another rank"
            print(RunFolder(self.file.parents[1]).farewell(cause, trainer.global_step), file=sys.stderr, flush=True)
        sys.exit(PREEMPTED if trainer.is_global_zero else 0)
