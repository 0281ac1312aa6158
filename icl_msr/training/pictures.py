"""Pictures of a module's latest batch, for the report at the end of a run and for dashboards while it trains."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.views import Views
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.pictures import Scene, draw
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.training.loggers import Dashboard, figures
from icl_msr.training.module import Pretraining


def make_scene(
    module: Pretraining,
    dataset: Dataset,
    batch: Callable[[], Views],
    *,
    features: Mapping[str, Tensor] | None = None,
    maps: bool = True,
) -> Scene:
    """Return the input of the pictures of a module.

    Args:
        module: the module.
        dataset: the data set that it is trained on.
        batch: returns a batch of training views, on the module's device.
        features: features of the trained encoder by split; see `Scene`.
        maps: whether the backbone has feature maps that can be drawn.
    """
    return Scene(
        dataset=replace(dataset.evaluated, mean=dataset.mean, std=dataset.std),
        features=features or {},
        batch=batch,
        backbone=module.method.backbone if maps else None,
        strata=module.regularizer.strata if isinstance(module.regularizer, MetaSemanticRegularizer) else None,
    )


class Pictures(pl.Callback):
    """Shows pictures of the latest batch on the dashboards, every few epochs. It does not change the training.

    Pictures that cannot be drawn are left out. The end of the run says which, and why.
    """

    def __init__(self, dataset: Dataset, *, every_n_epochs: PositiveInt):
        self.dataset, self.every_n_epochs = dataset, every_n_epochs

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dashboards = [logger for logger in trainer.loggers if isinstance(logger, Dashboard)]
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not (due and dashboards and trainer.is_global_zero):
            return
        assert isinstance(pl_module, Pretraining)
        assert pl_module.latest is not None
        views = pl_module.latest.views
        with TemporaryDirectory() as folder:
            draw(make_scene(pl_module, self.dataset, lambda: views), Path(folder) / "figures")
            for dashboard in dashboards:
                dashboard.show(figures(Path(folder)), trainer.global_step - 1)
