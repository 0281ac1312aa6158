"""A callback that gives a test the time to stop a run."""

import os
import time
from typing import Any

import pytorch_lightning as pl


class Slowly(pl.Callback):
    """Waits before every step of a first start, for as many seconds as the variable SLOWLY says.

    A run whose seed is in the variable FAILS ends with an error.
    """

    def __init__(self, seed: int):
        self.fails = str(seed) in os.environ.get("FAILS", "").split()
        again = {name: int(os.environ.get(name, 0)) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")}
        self.seconds = 0.0 if any(again.values()) else float(os.environ.get("SLOWLY", 0))

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if self.fails:
            raise RuntimeError("this job fails")
        time.sleep(self.seconds)
