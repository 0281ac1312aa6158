"""Counter-based random numbers: each is an integer hash of (seed, epoch, index, view, slot).

The numbers do not depend on the batch size, the worker, the rank or the device. They are bit-equal on CPU and GPU. The
mixer is the "lowbias32" finaliser found by exhaustive search (C. Wellons, hash-prospector, 2018).
The arithmetic uses int64, because its wrapping products keep the low 32 bits exact.
"""

import torch
from torch import Tensor

RUNS = 256
"""The runs of neighbours that a block of `permutation` mixes."""

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x = (x ^ (x >> 15)).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x ^ (x >> 16)


def keys(seed: int, epoch: int, index: Tensor, view: int) -> Tensor:
    """Return one key for each image of a view: int64 (N,) from `index` int64 (N,)."""
    key = torch.zeros_like(index)
    for word in (seed & _MASK, seed >> 32 & _MASK, epoch, view):
        key = _mix(key + word & _MASK) + 0x9E3779B9 & _MASK
    return _mix(_mix(key ^ index & _MASK) + (index >> 32) & _MASK)


def integers(key: Tensor, slots: int, first: int = 0) -> Tensor:
    """Return uniform integers in [0, 2^32), int64 (N, slots), for slots first .. first + slots - 1 of each key."""
    slot = torch.arange(first, first + slots, device=key.device)
    return _mix(_mix(slot * 0x9E3779B9 & _MASK)[None] + key[:, None] & _MASK)


def uniforms(key: Tensor, slots: int, first: int = 0) -> Tensor:
    """Return uniform float32 numbers in [0, 1) with 24 random bits, (N, slots); see `integers`."""
    return (integers(key, slots, first) >> 8).float() * 2.0**-24


def permutation(seed: int, epoch: int, length: int, block: int | None = None) -> Tensor:
    """Return a random order of `length` images: int64 (length,), on the CPU.

    With `block`, images that lie together stay near one another, so that a slow disk or a store is read in runs. Runs
    of `block // RUNS` neighbours are permuted, and then the images within each `block` of them.
    """
    index = torch.arange(length)
    key = keys(seed, epoch, index, view=-1)
    if block is not None:
        run = max(1, block // RUNS)
        place = torch.argsort(permutation(seed, epoch, -(-length // run)))
        key = key + (place[index // run] * run // block << 32)
    return torch.argsort(key, stable=True)
