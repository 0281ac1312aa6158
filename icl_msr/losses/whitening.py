"""W-MSE: the mean squared error of whitened embeddings. V views, M images on all ranks, D embedding."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from icl_msr.core.distributed import gather
from icl_msr.core.randomness import permutation
from icl_msr.losses.contrastive import full_precision
from icl_msr.losses.decorrelation import single
from icl_msr.losses.regression import squared_distance


def partition(images: int, size: int, iterations: int, step: int) -> list[Tensor]:
    """Return random sub-batches; each iteration puts every image into one of them (Ermolov et al. 2021, section 3).

    If `size` does not divide the batch, the sub-batches are a little larger (ours; the official code stops).

    Args:
        images: M, at least `size`.
        size: images of a sub-batch.
        iterations: number of independent partitions.
        step: index of the optimiser step.

    Returns:
        int64 indices of each sub-batch, on the CPU.
    """
    # Ranks must agree, so the order depends on the step only. The noise seed of a micro-batch differs between ranks.
    # The run's seed is not needed, because it has already shuffled the images.
    orders = [permutation(iteration, step, images) for iteration in range(iterations)]
    return [part for order in orders for part in order.tensor_split(images // size)]


def whiten(rows: Tensor, shrinkage: float) -> Tensor:
    """Return W (v - mean), rows with mean 0 and covariance I. W is the inverse of the covariance's Cholesky factor.

    Args:
        rows: (..., n, D), n > D.
        shrinkage: eps; the matrix that is inverted is (1 - eps) covariance + eps I.

    Returns:
        (..., n, D), in the dtype of the rows. It is computed in fp64, because a covariance has the square of the rows'
        condition number. It is NaN if the covariance has no Cholesky factor, for example if rows are not finite.
    """
    centred = rows.double() - rows.double().mean(-2, keepdim=True)
    covariance = centred.mT @ centred / (rows.shape[-2] - 1)
    identity = torch.eye(rows.shape[-1], dtype=covariance.dtype, device=rows.device)
    # `torch.linalg.cholesky` makes the host wait for the device, to check that a factor exists.
    factor, failed = torch.linalg.cholesky_ex((1 - shrinkage) * covariance + shrinkage * identity)
    factor = factor.masked_fill((failed != 0)[..., None, None], torch.nan)
    whitened: Tensor = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
    return whitened.to(rows.dtype)


@full_precision
def wmse(views: Tensor, parts: Sequence[Tensor], shrinkage: float) -> Tensor:
    """Return the squared distance of two views' whitened, normalised embeddings (Ermolov et al. 2021, section 3).

    Each view is whitened separately, one sub-batch after the other, over the images of all ranks.

    Args:
        views: (V, N, D), embeddings of each view.
        parts: indices of the M gathered images, as returned by `partition`.
        shrinkage: see `whiten`.

    Returns:
        () mean over all pairs of views, images and iterations of 2 - 2 cos, the same on all ranks.
    """
    everyone = torch.stack([gather(single(view)) for view in views])  # (V, M, D)
    there = [part.to(everyone.device, non_blocking=True) for part in parts]
    whitened = torch.cat([whiten(everyone[:, part], shrinkage) for part in there], dim=1)
    return torch.stack([squared_distance(*pair) for pair in itertools.combinations(whitened, 2)]).mean()
