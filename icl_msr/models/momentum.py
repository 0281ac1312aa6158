"""Parts of momentum methods: a copy of an encoder that follows it slowly, and a queue of its keys."""

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from icl_msr.core.distributed import gather
from icl_msr.core.memory import require_memory
from icl_msr.losses.contrastive import unit
from icl_msr.models.backbones import Backbone

Momentum = Annotated[float, Field(ge=0, le=1)]
"""Weight m of the old value in an exponential moving average."""
Statistics = Literal["own", "online"]
"""Source of a momentum encoder's running statistics: its own batches, or the online encoder."""


class MomentumEncoder(nn.Module):
    """A copy of backbone and projector that follows them and is never trained.

    It stays in training mode, so that it normalises with batch statistics as its source does. Its running statistics
    matter only when it is evaluated.

    Args:
        backbone, projector: the networks that are copied.
        momentum: m of each step.
        statistics: `own` keeps running statistics of its own batches; `online` copies those of the online encoder.
        rising: True lets m grow to 1 on a cosine over the whole training (BYOL, section 3.2).
    """

    def __init__(
        self,
        backbone: Backbone,
        projector: nn.Module,
        momentum: float,
        statistics: Statistics,
        *,
        rising: bool = False,
    ):
        super().__init__()
        self.momentum, self.statistics, self.rising = momentum, statistics, rising
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.projector = copy.deepcopy(projector).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of images (N, C, H, W)."""
        embeddings: Tensor = self.projector(self.backbone(images))
        return embeddings

    @torch.no_grad()
    def follow(self, backbone: nn.Module, projector: nn.Module, progress: float) -> None:
        """Update all parameters: theta_k <- m theta_k + (1 - m) theta_q.

        Args:
            backbone, projector: the trained networks.
            progress: finished share of training, from 0 to 1.
        """
        momentum = rising_momentum(self.momentum, progress) if self.rising else self.momentum
        mine: list[Tensor] = list(self.parameters())
        theirs: list[Tensor] = [*backbone.parameters(), *projector.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        if self.statistics == "online":
            sources = itertools.chain(backbone.buffers(), projector.buffers())
            for own, source in zip(self.buffers(), sources, strict=True):
                own.copy_(source)


def rising_momentum(base: float, progress: float) -> float:
    """Return the momentum on a cosine from `base` at progress 0 to 1 at progress 1 (BYOL, section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


class Queue(nn.Module):
    """A ring buffer of the last K keys of all ranks. It is saved in checkpoints and starts with random unit vectors."""

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        require_memory(f"A queue of {size} keys", 12.0 * size * dim, "choose a smaller method.queue_size")
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("keys", unit(torch.randn(size, dim, generator=generator)))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest entries with this batch, (N, D) on each rank."""
        everyone = gather(unit(keys))[-len(self.keys) :]
        slots = (self.position + torch.arange(len(everyone), device=self.keys.device)) % len(self.keys)
        # Not in place: autograd may still hold the keys of this step's loss.
        self.keys = self.keys.index_copy(0, slots, everyone.to(self.keys.dtype))
        self.position = (self.position + len(everyone)) % len(self.keys)

    @contextmanager
    def without(self, rows: int, newer: int) -> Iterator[None]:
        """Hide the keys of an earlier batch: `rows` keys, after which `newer` keys were pushed."""
        whole = self.keys
        age = (self.position - 1 - torch.arange(len(whole), device=whole.device)) % len(whole)
        self.keys = whole[(age < newer) | (age >= newer + rows)]
        try:
            yield
        finally:
            self.keys = whole
