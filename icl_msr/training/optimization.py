"""Optimisers and schedules as pure functions of the optimiser step."""

import math
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from icl_msr.core.errors import UserError


def _lars() -> Any:
    try:
        from timm.optim.lars import Lars
    except ImportError:
        raise UserError(
            "optimizer=lars needs timm, which is not installed; type: pip install 'icl-msr[timm]'."
        ) from None
    return Lars


class Optimization:
    """Builds the optimiser and its learning-rate schedule.

    The effective learning rate is `lr` times (global batch / 256) if `scale_lr` is linear (Goyal et al. 2017). LARS is
    timm's (You et al. 2017): a layer learns at lr r with r = `trust_coefficient` |w| / (|g| + decay |w|), or at the
    smaller of lr and r if `trust_clip` (LARC). What is free of decay is free of this adaptation too.

    Raises:
        UserError: LARS without timm.
    """

    def __init__(
        self,
        *,
        name: Literal["sgd", "adam", "adamw", "lars"],
        lr: PositiveFloat,
        weight_decay: NonNegativeFloat,
        momentum: NonNegativeFloat,
        scale_lr: Literal["none", "linear"],
        decay_bias_and_norm: bool,
        schedule: Literal["constant", "cosine", "drops"],
        drop_at: list[NonNegativeInt],
        drop_factor: PositiveFloat,
        warmup_steps: NonNegativeInt,
        warmup_epochs: NonNegativeFloat,
        trust_coefficient: PositiveFloat,
        trust_clip: bool,
    ):
        if name == "lars":
            _lars()
        self.name, self.lr, self.weight_decay, self.momentum = name, lr, weight_decay, momentum
        self.scale_lr, self.decay_bias_and_norm = scale_lr, decay_bias_and_norm
        self.schedule, self.drop_at, self.drop_factor = schedule, drop_at, drop_factor
        self.warmup_steps, self.warmup_epochs = warmup_steps, warmup_epochs
        self.trust = {"trust_coeff": trust_coefficient, "trust_clip": trust_clip}

    def effective_lr(self, global_batch: int) -> float:
        """The learning rate after warm-up."""
        return self.lr * global_batch / 256 if self.scale_lr == "linear" else self.lr

    def factor(self, step: int, total_steps: int, steps_per_epoch: float) -> float:
        """Share of the effective learning rate that holds at optimiser step 0 .. total_steps - 1."""
        warmup = max(self.warmup_steps, round(self.warmup_epochs * steps_per_epoch))
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1))) / 2
        if self.schedule == "drops":
            passed = sum(0 < total_steps - epochs * steps_per_epoch <= step for epochs in self.drop_at)
            return float(self.drop_factor**passed)
        return 1.0

    def build(
        self, module: nn.Module, global_batch: int, total_steps: int, steps_per_epoch: float
    ) -> tuple[Optimizer, LambdaLR]:
        """Optimiser over the module's trainable parameters, and the schedule that ticks once an optimiser step.

        `drop_at` counts epochs before the end (ICL-MSR, section 6.2: x 0.2 at 50 and 25 epochs before the end); a drop
        that would lie before the beginning of a short run is left out.
        """
        decayed: list[nn.Parameter] = []
        free: list[nn.Parameter] = []
        for parameter in module.parameters():
            if parameter.requires_grad:
                # Biases and the scales of normalisation layers are the vectors of a network.
                (decayed if parameter.ndim > 1 or self.decay_bias_and_norm else free).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        lr = self.effective_lr(global_batch)
        optimizer: Optimizer
        if self.name == "sgd":
            optimizer = torch.optim.SGD(groups, lr, momentum=self.momentum, weight_decay=self.weight_decay)
        elif self.name == "lars":
            groups[0]["always_adapt"] = True  # else no decay would mean plain SGD
            optimizer = _lars()(groups, lr, momentum=self.momentum, weight_decay=self.weight_decay, **self.trust)
        else:
            kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
            optimizer = kind(groups, lr, weight_decay=self.weight_decay)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total_steps, steps_per_epoch))
