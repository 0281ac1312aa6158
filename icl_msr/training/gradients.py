"""Histograms of the gradients on dashboards."""

import pytorch_lightning as pl
from pydantic import PositiveInt
from torch.optim import Optimizer
from typing_extensions import override

from icl_msr.training.loggers import Dashboard
from icl_msr.training.module import Pretraining


class Gradients(pl.Callback):
    """Shows the distribution of each parameter's gradient on the dashboards, every few optimiser steps.

    The gradient is that of the whole step, unscaled and not yet clipped. Values that are not finite are left out.
    """

    def __init__(self, *, every_n_steps: PositiveInt):
        self.every_n_steps = every_n_steps

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        dashboards = [logger for logger in trainer.loggers if isinstance(logger, Dashboard)]
        due = (trainer.global_step + 1) % self.every_n_steps == 0
        if not (due and dashboards and trainer.is_global_zero):
            return
        assert isinstance(pl_module, Pretraining)
        found = {}
        for name, parameter in pl_module.method.named_parameters():
            if parameter.grad is not None:
                values = parameter.grad.detach().float().flatten()
                found[f"gradients/{name}"] = values[values.isfinite()].cpu().numpy()
        for dashboard in dashboards:
            dashboard.histograms({name: values for name, values in found.items() if len(values)}, trainer.global_step)
