"""Loggers beside the CSV file."""

from pathlib import Path
from typing import Any, Literal


def wandb_logger(folder: Path, *, project: str, mode: Literal["online", "offline"]) -> Any:
    """Lightning's Weights & Biases logger, writing into the run folder; wandb is imported only here."""
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(project=project, save_dir=folder, offline=mode == "offline")
