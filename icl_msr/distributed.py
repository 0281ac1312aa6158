"""Gathering over ranks, exact in the gradient for any number of ranks and any order of derivative.

With one process every function here is the identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _all_gather(local: Tensor) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def _sum_my_part(everyone: Tensor) -> Tensor:
    total = everyone.contiguous().clone()
    dist.all_reduce(total)
    return total.chunk(world_size())[rank()].clone()


class _Gather(Function):
    """(N, ...) on each rank to (W N, ...) on all; its adjoint sums every rank's gradient of my rows."""

    @staticmethod
    def forward(local: Tensor) -> Tensor:
        return _all_gather(local)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Scatter.apply(gradient)  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _all_gather(tangent)


class _Scatter(Function):
    """The adjoint of `_Gather`, and `_Gather` is its adjoint: so derivatives of every order cross the ranks."""

    @staticmethod
    def forward(everyone: Tensor) -> Tensor:
        return _sum_my_part(everyone)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Gather.apply(gradient)  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _sum_my_part(tangent)


def gather(local: Tensor) -> Tensor:
    """The rows of every rank, in rank order: (N, ...) to (W N, ...).

    Each rank's loss is a mean over its own rows and DDP averages the ranks' gradients, so a loss that compares local
    rows with gathered ones has the gradient of one process on the whole batch.
    """
    return local if world_size() == 1 else _Gather.apply(local)
