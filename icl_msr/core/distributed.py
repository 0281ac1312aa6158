"""Collectives with exact derivatives of every order, for any number of ranks.

Every rank's loss is a mean over its own rows, and the training loss L is the mean of the W ranks' losses. All ranks
differentiate at the same time, and the adjoint of a sum over ranks is a sum over ranks. So a rank's gradient with
respect to its own copy of a parameter is the derivative of W L, and the average over the copies is the derivative of L
itself. The same holds for derivatives of derivatives: only the last one is averaged.

All ranks must call the same collectives in the same order. With one process every function here is the identity.
"""

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function


def join(gpu: bool) -> None:
    """Join the process group of the ranks that were started together.

    torchrun keeps one store for all attempts of `--max-restarts`, and what the last attempt has left there would stop
    the next one. So each attempt has a prefix of its own.
    """
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        atexit.register(leave)  # NCCL warns of a group that is still there at the end
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=size)


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, counted from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _sum_over_ranks(local: Tensor) -> Tensor:
    total = local.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _Sum(Function):
    """A sum over ranks. It is its own adjoint, so all derivatives cross ranks, in reverse and forward mode."""

    @staticmethod
    def forward(local: Tensor) -> Tensor:
        return _sum_over_ranks(local)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _Sum.apply(tangent)  # type: ignore[no-any-return]


def all_reduce_sum(local: Tensor) -> Tensor:
    """Return the sum over ranks, on every rank, in the same shape."""
    return local if world_size() == 1 else _Sum.apply(local)


def gather(local: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order: (N, ...) to (W N, ...); N is the same on all ranks.

    A loss that compares local rows with gathered ones has the gradient of one process on the whole batch.
    """
    if world_size() == 1:
        return local
    # Adding zeros is exact, and the sum brings its derivatives along; the rows are few compared with images.
    return all_reduce_sum(torch.cat([local if r == rank() else torch.zeros_like(local) for r in range(world_size())]))


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the means over ranks of tensors of one dtype, such as gradients, in one message; without gradient."""
    if world_size() == 1:
        return list(tensors)
    bucket = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(bucket)
    parts = torch.split(bucket / world_size(), [t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


@torch.no_grad()
def collect(local: Tensor) -> Tensor:
    """Return the rows of all ranks in rank order, as `gather`, but without derivatives, which costs less for images."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place with those of the first rank."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def everywhere(here: bool) -> bool:
    """Return whether `here` is true on every rank."""
    if world_size() == 1:
        return here
    answers: list[Any] = [None] * world_size()
    dist.all_gather_object(answers, here)
    return all(answers)
