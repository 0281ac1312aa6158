"""Losses on the correlations between the dimensions of an embedding. N images per rank, D embedding.

All statistics, and their gradients, are those of the batch of all ranks. With separate statistics on each rank, N ranks
would follow a different gradient than one. Embeddings are not normalised. Everything is computed in (at least) fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from icl_msr.core.distributed import all_reduce_sum, world_size
from icl_msr.losses.contrastive import full_precision

BARLOW_EPSILON = 1e-5
"""Added to the variances, as the BatchNorm of the official code does."""
VICREG_EPSILON = 1e-4
"""Added to the variances, as in the paper (section 4.1)."""


def single(rows: Tensor) -> Tensor:
    """Return the rows at least in fp32."""
    return rows.float() if rows.dtype.itemsize < 4 else rows


def global_mean(rows: Tensor) -> Tensor:
    """Return the mean over the rows of all ranks: (N, ...) to (...)."""
    return all_reduce_sum(rows.mean(0)) / world_size()


def cross_covariance(first: Tensor, second: Tensor) -> Tensor:
    """Return the biased covariance of two views' dimensions over the rows of all ranks: (N, D) and (N, E) to (D, E)."""
    first, second = first - global_mean(first), second - global_mean(second)
    return all_reduce_sum(first.T @ second / len(first)) / world_size()


def off_diagonal_squares(matrix: Tensor) -> Tensor:
    """Return the sum of the squares () of a (D, D) matrix outside its diagonal."""
    return matrix.square().sum() - matrix.diagonal().square().sum()


@full_precision
def barlow_twins(first: Tensor, second: Tensor, off_diagonal: float) -> Tensor:
    """Return how far the cross-correlation of two views is from the identity (Zbontar et al. 2021, eq. 1 and 2).

    Args:
        first, second: (N, D) embeddings of the two views.
        off_diagonal: lambda, weight of the redundancy reduction.

    Returns:
        () sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2.
    """
    views = [single(first), single(second)]
    precisions = [(global_mean((z - global_mean(z)).square()) + BARLOW_EPSILON).rsqrt() for z in views]
    correlation = cross_covariance(*views) * torch.outer(*precisions)
    return (1 - correlation.diagonal()).square().sum() + off_diagonal * off_diagonal_squares(correlation)


@full_precision
def vicreg(first: Tensor, second: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Return the variance, invariance and covariance loss (Bardes et al. 2022, section 4.1).

    Terms are normalised as in the official code.

    Args:
        first, second: (N, D) embeddings of the two views.
        invariance: weight of the mean squared distance per dimension (the paper sums over dimensions).
        variance: weight of the hinge that keeps each dimension's standard deviation at 1 or more, averaged over both
            views (the paper adds them).
        covariance: weight of the squared covariances between dimensions, divided by D and added over both views.

    Returns:
        () the weighted sum.
    """
    first, second = single(first), single(second)
    count = len(first) * world_size()
    loss = invariance * F.mse_loss(first, second)
    for view in (first, second):
        covariances = cross_covariance(view, view) * (count / (count - 1))
        deviations = (covariances.diagonal() + VICREG_EPSILON).sqrt()
        loss = loss + variance * F.relu(1 - deviations).mean() / 2
        loss = loss + covariance * off_diagonal_squares(covariances) / view.shape[1]
    return loss
