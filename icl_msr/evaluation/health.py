"""Measures of how well a representation uses its space, without labels.

N images, c channels; computed in float64.
"""

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """Return RankMe (Garrido et al., ICML 2023): exp of the entropy of the singular values, from 1 to min(N, c).

    `features` (N, c) are neither centred nor normalised, as in the paper.
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def feature_std(features: Tensor) -> float:
    """Return the mean over channels of the standard deviation of unit features, times sqrt(c).

    It is 1 for features (N, c) that are spread evenly, and 0 for collapsed ones.
    """
    return float(_unit(features).std(0, correction=0).mean() * features.shape[1] ** 0.5)


def alignment(first: Tensor, second: Tensor, power: float = 2.0) -> float:
    """Return the alignment E |f(x) - f(y)|^power of positive pairs (Wang and Isola, ICML 2020).

    Features (N, c) are scaled to unit length. Less is better.
    """
    distances: Tensor = (_unit(first) - _unit(second)).norm(dim=1)
    return float((distances**power).mean())


def spread(features: Tensor, t: float = 2.0) -> float:
    """Return the uniformity of Wang and Isola: log E exp(-t |f(x) - f(y)|^2) over pairs of different images.

    Features (N, c) are scaled to unit length. Less is better. The matrix of pairs is computed in pieces.
    """
    rows = _unit(features)
    n = len(rows)
    parts = [torch.logsumexp((2 * t * (part @ rows.T) - 2 * t).flatten(), 0) for part in torch.split(rows, 1024)]
    everything = torch.logsumexp(torch.stack(parts), 0)
    # The n pairs of an image with itself are subtracted; each adds exp(0).
    return float(torch.log(torch.exp(everything) - n) - torch.log(torch.tensor(n * (n - 1.0))))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the similarity of two representations of the same images, (N, c) and (N, d), in [0, 1].

    It does not depend on rotations.

    Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.
    """
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)
