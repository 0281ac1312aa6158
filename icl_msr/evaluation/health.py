"""How well a representation uses its space, without labels. N images, c channels; float64 inside."""

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al., ICML 2023): exp of the entropy of the singular values, 1 to min(N, c).

    `features` (N, c) as they are, neither centred nor normalised, as in the paper.
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def feature_std(features: Tensor) -> float:
    """Mean over channels of the standard deviation of unit features times sqrt(c): 1 spread evenly, 0 collapsed."""
    return float(_unit(features).std(0, correction=0).mean() * features.shape[1] ** 0.5)


def alignment(first: Tensor, second: Tensor, power: float = 2.0) -> float:
    """E |f(x) - f(y)|^power of positive pairs (Wang and Isola, ICML 2020), unit features (N, c); less is better."""
    distances: Tensor = (_unit(first) - _unit(second)).norm(dim=1)
    return float((distances**power).mean())


def spread(features: Tensor, t: float = 2.0) -> float:
    """Uniformity of Wang and Isola: log E exp(-t |f(x) - f(y)|^2) over pairs of different images, unit features (N, c).

    Less is better. The matrix of pairs is made in pieces.
    """
    rows = _unit(features)
    n = len(rows)
    parts = [torch.logsumexp((2 * t * (part @ rows.T) - 2 * t).flatten(), 0) for part in torch.split(rows, 1024)]
    everything = torch.logsumexp(torch.stack(parts), 0)
    # The n pairs of an image with itself, each exp(0), are taken out.
    return float(torch.log(torch.exp(everything) - n) - torch.log(torch.tensor(n * (n - 1.0))))


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Similarity of two representations of the same images, (N, c) and (N, d), in [0, 1]; rotations do not matter.

    Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.
    """
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1)
