"""TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from icl_msr.core.errors import UserError
from icl_msr.core.ranks import is_first
from icl_msr.core.records import Outcome
from icl_msr.core.saved import flatten
from icl_msr.training.loggers.base import About, Picture, figures


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files, in a folder with the name of the run below the run's folder.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, about: About):
        self.about = about
        named = about.name.replace("/", "_")
        try:
            super().__init__(
                folder, name="tensorboard", version=named, default_hp_metric=False, purge_step=about.resumed_at
            )
        except ModuleNotFoundError:
            raise UserError(
                "logger=tensorboard needs tensorboard, which is not installed; type: "
                "pip install 'icl-msr[tensorboard]'."
            ) from None
        if is_first():
            text = OmegaConf.to_yaml(OmegaConf.create(about.config))
            self.experiment.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    @rank_zero_only
    def show(self, pictures: Mapping[str, Picture], step: int | None = None) -> None:
        """Write pictures."""
        from matplotlib.image import imread

        for name, picture in pictures.items():
            self.experiment.add_image(name, imread(picture.file)[..., :3], step, dataformats="HWC")

    @rank_zero_only
    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Write distributions of values."""
        for name, array in values.items():
            self.experiment.add_histogram(name, array, step)

    @rank_zero_only
    def conclude(self, folder: Path) -> None:
        """Write the pictures, the final numbers, and the config beside them for the table of hyperparameters."""
        self.show(figures(folder))
        final = {f"final/{name}": value for name, value in Outcome.load(folder).dashboard_numbers().items()}
        self.log_hyperparams(flatten(self.about.config), final)

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Flush the event file."""
        self.finalize("success" if exit_code == 0 else "failed")
