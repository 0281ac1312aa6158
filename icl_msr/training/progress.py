"""Callbacks for the speed of training and for one printed line per epoch."""

import math
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from icl_msr.training.optimization import steps_per_epoch


def ends_now(trainer: pl.Trainer) -> bool:
    """Return whether training ends after this batch: a callback has stopped the run, or all steps are done."""
    return trainer.should_stop or trainer.global_step == trainer.max_steps


def last_epoch(trainer: pl.Trainer) -> bool:
    """Return whether the epoch that ends is the last one."""
    return trainer.current_epoch + 1 == trainer.max_epochs or ends_now(trainer)


class Throughput(pl.Callback):
    """Logs source images per second. The time includes all of training and excludes evaluation."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.seconds, self.images = 0.0, 0
        self.earlier = 0.0
        """Wall time of the run before it was continued, in seconds."""
        self._began = time.perf_counter()
        self._since: float | None = None

    @override
    def state_dict(self) -> dict[str, float]:
        elapsed = self.earlier + time.perf_counter() - self._began
        return {"seconds": self.seconds, "images": self.images, "elapsed": elapsed}

    @override
    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds, self.images = state_dict["seconds"], int(state_dict["images"])
        self.earlier = state_dict["elapsed"]

    @property
    def rate(self) -> float:
        """Images per second over the run so far."""
        return self.images / max(self.seconds, 1e-9)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The first batch is not counted, because it warms up caches and allocators.
        now = time.perf_counter()
        if self._since is not None and trainer.global_step > 1:
            self.seconds += now - self._since
            self.images += self.batch_size
        self._since = now
        if (trainer.global_step) % trainer.log_every_n_steps == 0 and self.images:  # type: ignore[attr-defined]
            pl_module.log("images_per_second", self.rate)


class EpochLines(pl.Callback):
    """Prints a line per epoch if there is no progress bar: loss, online accuracies, speed and time left."""

    def __init__(self, throughput: Throughput):
        self.throughput = throughput
        self._began = 0.0
        self._first_epoch = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._first_epoch = time.perf_counter(), trainer.current_epoch

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.progress_bar_callback is not None:
            return
        done = trainer.current_epoch + 1
        total = math.ceil(trainer.estimated_stepping_batches / steps_per_epoch(trainer))
        seconds = (time.perf_counter() - self._began) / (done - self._first_epoch) * (total - done)
        shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [f"epoch {done:>{len(str(total))}}/{total}"]
        if "loss" in shown:  # it is missing until the first step that is logged
            parts.append(f"loss {shown['loss']:.3f}")
        for name in ("online/knn", "online/probe"):
            if name in shown:
                parts.append(f"{name.removeprefix('online/')} {100 * shown[name]:.1f} %")
        parts += [f"{self.throughput.rate:,.0f} images/s", f"{timedelta(seconds=round(seconds))} left"]
        print("   ".join(parts), flush=True)
