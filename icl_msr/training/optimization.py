"""Any torch optimiser with any schedule, and schedules that are functions of the optimiser step."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

if TYPE_CHECKING:  # the check of an optimiser does not need it
    import pytorch_lightning as pl


class Optimization:
    """Builds the optimiser of a module and its learning-rate schedule.

    Args:
        optimizer: a function of `params`, such as `partial(torch.optim.Adam, lr=1e-3)`.
        schedule: a function of `optimizer`, `total_steps`, `steps_per_epoch` and `global_batch`, such as
            `partial(cosine, warmup_steps=100)`. The scheduler that it returns is stepped once per optimiser step.
        bias_and_norm: arguments of the optimiser that differ for biases and the scales of normalisation layers.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[..., LRScheduler],
        bias_and_norm: Mapping[str, Any] | None = None,
    ):
        self.optimizer, self.schedule, self.bias_and_norm = optimizer, schedule, dict(bias_and_norm or {})

    def build(
        self, module: nn.Module, global_batch: int, total_steps: int, steps_per_epoch: float
    ) -> tuple[Optimizer, LRScheduler]:
        """Return the optimiser of the module's trainable parameters and its schedule, stepped once per optimiser step.

        Args:
            module: the module. Its weights form the first parameter group, its biases and norms the second one.
            global_batch: images of an optimiser step, on all devices together.
            total_steps: optimiser steps of the whole training.
            steps_per_epoch: optimiser steps of an epoch.
        """
        weights: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []  # biases and the scales of normalisation layers
        for parameter in module.parameters():
            if parameter.requires_grad:
                (weights if parameter.ndim > 1 or not self.bias_and_norm else vectors).append(parameter)
        groups = [{"params": weights}, {"params": vectors, **self.bias_and_norm}]
        optimizer = self.optimizer(params=[group for group in groups if group["params"]])
        keys = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "global_batch": global_batch}
        return optimizer, self.schedule(optimizer=optimizer, **keys)

    def learning_rate(self, step: int, global_batch: int, total_steps: int, steps_per_epoch: float) -> float | None:
        """Return the learning rate of an optimiser step (from 0); None for a schedule that depends on the past."""
        _, schedule = self.build(_example(), global_batch, total_steps, steps_per_epoch)
        return rate_at(schedule, step)

    def effective_lr(self, global_batch: int) -> float:
        """Return the learning rate after warm-up, including the schedule's scale for the batch size."""
        optimizer, _ = self.build(_example(), global_batch, 1000, 100)
        return float(optimizer.param_groups[0]["initial_lr"])


def _example() -> nn.Module:
    """Return a small module that draws no random numbers."""
    return nn.ParameterList([torch.zeros(1, 1), torch.zeros(1)])


def steps_per_epoch(trainer: "pl.Trainer") -> int:
    """Return the number of optimiser steps of an epoch. It is known only after the loader is made."""
    if trainer.num_training_batches == math.inf:
        trainer.fit_loop.setup_data()
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def rate_at(schedule: LRScheduler, step: int) -> float | None:
    """Return the learning rate of the first parameter group at an optimiser step; None if it depends on the past."""
    return float(schedule.base_lrs[0] * schedule.lr_lambdas[0](step)) if isinstance(schedule, LambdaLR) else None


def follow(schedule: LRScheduler) -> None:
    """Set the learning rates to those of the schedule's step, for a run that resumes with another length."""
    if isinstance(schedule, LambdaLR):
        for group, rate, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * factor(schedule.last_epoch)


def constant(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    global_batch: int,
    *,
    warmup_steps: NonNegativeInt,
    warmup_epochs: NonNegativeFloat,
    scale_lr: Literal["none", "linear"],
) -> LambdaLR:
    """Return a schedule that stays at the optimiser's learning rate after a linear warm-up.

    The warm-up lasts for `warmup_steps` or `warmup_epochs`, whichever is longer. `scale_lr="linear"` multiplies the
    learning rate by global batch / 256 (Goyal et al. 2017).
    """
    warmup = max(warmup_steps, round(warmup_epochs * steps_per_epoch))
    return _warmed(optimizer, warmup, lambda step: 1.0, global_batch, scale_lr)


def cosine(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    global_batch: int,
    *,
    warmup_steps: NonNegativeInt,
    warmup_epochs: NonNegativeFloat,
    scale_lr: Literal["none", "linear"],
) -> LambdaLR:
    """Return a schedule that falls to zero on half a cosine. Warm-up and scale are those of `constant`."""
    warmup = max(warmup_steps, round(warmup_epochs * steps_per_epoch))

    def factor(step: int) -> float:
        return (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1))) / 2

    return _warmed(optimizer, warmup, factor, global_batch, scale_lr)


def drops(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    global_batch: int,
    *,
    drop_at: list[NonNegativeInt],
    drop_factor: PositiveFloat,
    warmup_steps: NonNegativeInt,
    warmup_epochs: NonNegativeFloat,
    scale_lr: Literal["none", "linear"],
) -> LambdaLR:
    """Return a schedule that multiplies the learning rate by `drop_factor` at given epochs before the end.

    Warm-up and scale are those of `constant`. A drop that would come before the start of a short run is left out.
    ICL-MSR (section 6.2) multiplies by 0.2 at 50 and at 25 epochs before the end.
    """
    warmup = max(warmup_steps, round(warmup_epochs * steps_per_epoch))

    def factor(step: int) -> float:
        passed = sum(0 < total_steps - epochs * steps_per_epoch <= step for epochs in drop_at)
        return float(drop_factor**passed)

    return _warmed(optimizer, warmup, factor, global_batch, scale_lr)


def _warmed(
    optimizer: Optimizer, warmup: int, factor: Callable[[int], float], global_batch: int, scale_lr: str
) -> LambdaLR:
    if scale_lr == "linear":
        for group in optimizer.param_groups:
            group["lr"] *= global_batch / 256
    return LambdaLR(optimizer, lambda step: (step + 1) / warmup if step < warmup else factor(step))
