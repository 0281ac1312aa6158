"""A callback that gives a test the time to stop a run."""

import os
import time
from typing import Any

import pytorch_lightning as pl


class Slowly(pl.Callback):
    """Waits before every step of a job's first start, for as many seconds as the variable SLOWLY says."""

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            time.sleep(float(os.environ.get("SLOWLY", 0)))
