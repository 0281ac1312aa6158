"""Kernel dependence by random Fourier features. V views, N images per rank, D embedding, F frequencies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icl_msr.core.randomness import keys, uniforms
from icl_msr.losses.contrastive import full_precision, unit
from icl_msr.losses.decorrelation import cross_covariance, global_mean


def imq_frequencies(count: int, dim: int, scale: float, draw: int) -> Tensor:
    """Draw frequencies w of the inverse multiquadric kernel k(x, y) = c / sqrt(c^2 + |x - y|^2) = E cos w.(x - y).

    The kernel is a mixture of Gaussian kernels, because E exp(-h^2 r^2 / 2) = 1 / sqrt(1 + r^2) for a normal number h.
    So w is a normal vector times a normal number, divided by c. (This is ours. The official code tabulates the density
    of |w|, a Bessel function. The distribution is the same.)

    Args:
        count, dim: F and D.
        scale: c > 0.
        draw: number of the draw. The same number gives the same frequencies on any rank.

    Returns:
        (F, D) float64, on the CPU.
    """
    uniform = uniforms(keys(0, draw, torch.arange(count), view=-3), dim + 1).double() + 2.0**-25
    normal: Tensor = torch.special.ndtri(uniform)
    return normal[:, :1] * normal[:, 1:] / scale


def fourier_features(rows: Tensor, frequencies: Tensor) -> Tensor:
    """Return phi(x), with E phi(x).phi(y) = k(x, y) and phi(x).phi(x) = 1: (..., D) and (F, D) to (..., 2F)."""
    angles = rows @ frequencies.T
    return torch.cat([angles.cos(), angles.sin()], dim=-1) / math.sqrt(len(frequencies))


def hsic_zy(features: Tensor) -> Tensor:
    """Return the HSIC between embeddings and image identity, up to a factor (Li et al. 2021, section 3, appendix A).

    It is the mean of k over pairs of different views of an image, minus its mean over all pairs of embeddings.

    Args:
        features: (V, N, 2F) Fourier features of the views.

    Returns:
        () whose mean over ranks is the estimate from all images.
    """
    views = len(features)
    together = features.sum(0).square().sum(1).mean()  # V^2 pairs of views; V pair a view with itself: k = 1
    return (together - views) / (views * (views - 1)) - global_mean(features.mean(0)).square().sum()


def root_hsic_zz(features: Tensor, others: Tensor) -> Tensor:
    """Return the root of HSIC(Z, Z) = tr(K H K H) / (V M)^2, the kernelised variance of the embeddings, over all ranks.

    The two factors K come from independent random features. So the square is an unbiased estimate of the value with
    exact kernels.

    Args:
        features, others: (V, N, 2F) Fourier features of the same rows from independent frequencies.

    Returns:
        () the same on all ranks.
    """
    root: Tensor = torch.linalg.vector_norm(cross_covariance(features.flatten(0, 1), others.flatten(0, 1)))
    return root


@full_precision
def ssl_hsic(views: Tensor, frequencies: Sequence[Tensor], gamma: float) -> Tensor:
    """Return -HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z)); Z: unit embeddings, Y: image identity (Li et al. 2021, section 3).

    Args:
        views: (V, N, D) embeddings of N images, V >= 2 of each.
        frequencies: two independent draws (F, D).
        gamma: weight of the variance.

    Returns:
        () whose mean over ranks is the loss.
    """
    rows = unit(views)
    features, others = (fourier_features(rows, f.to(rows, non_blocking=True)) for f in frequencies)
    return gamma * root_hsic_zz(features, others) - hsic_zy(features)
