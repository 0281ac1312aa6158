"""A rank's part of a batch, and the error of the ranks' results relative to one process."""

import torch
from torch import Tensor

from icl_msr.core.distributed import rank, world_size
from icl_msr.core.views import Views

TOLERANCE = 1e-8
"""Largest allowed relative error of a gradient over ranks, in float64."""


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error max|g - g_ref| / max|g_ref|."""
    assert found.shape == expected.shape
    if not expected.any():
        return float(found.abs().max())
    return float((found - expected).abs().max().detach() / expected.abs().max().detach())


def mine(rows: Tensor) -> Tensor:
    """Return this rank's part of the global batch; all of it with one process."""
    return rows.chunk(world_size())[rank()]


def my_views(views: Views) -> Views:
    negatives = views.negatives
    if negatives is not None:
        negatives.rows = mine(negatives.rows)
    return Views(mine(views.images), [mine(v) for v in views.views], mine(views.index), mine(views.labels), negatives)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors.values()])
