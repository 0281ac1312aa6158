"""Both papers' formulas, written from their text with loops over images. Nothing here is shared with the package."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = Sequence[Tensor]
Close = Callable[[str, Any, Any, float], None]
"""Compares ours with theirs, by name, within a relative tolerance."""


def sim(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of two vectors."""
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def contrastive(views: Sequence[Rows], tau: float) -> Tensor:
    """SimCLR's loss, summed over the 2N anchors: the denominator holds the 2N - 2 views of other images."""
    total = torch.zeros((), dtype=torch.float64)
    for j in (0, 1):
        for i, anchor in enumerate(views[j]):
            positive = torch.exp(sim(anchor, views[1 - j][i]) / tau)
            others = [torch.exp(sim(anchor, z) / tau) for view in views for k, z in enumerate(view) if k != i]
            total = total - torch.log(positive / (positive + torch.stack(others).sum()))
    return total


def msr(views: Sequence[Rows], moved: Sequence[Sequence[Rows]], tau: float, denominators: str) -> Tensor:
    """L_msr (eq. 3 to 6), summed over the anchors.

    Args:
        views: views[j][i] = h(Z_i^j), vectors.
        moved: moved[j][i][t] = h(a_t * Z_i^j).
        tau: temperature.
        denominators: `printed`: the other view only (eq. 4); `all`: both views, as the prose says.
    """
    total = torch.zeros((), dtype=torch.float64)
    for j in (0, 1):
        for i, anchor in enumerate(views[j]):
            shown = (1 - j,) if denominators == "printed" else (0, 1)
            negative = torch.zeros((), dtype=torch.float64)
            for view in shown:
                for k, other in enumerate(views[view]):
                    if k != i:
                        negative = negative + torch.exp(sim(anchor, other) / tau)
            adjusted = torch.zeros((), dtype=torch.float64)
            for stratum in moved[1 - j][i]:
                e = torch.exp(sim(anchor, stratum) / tau)
                adjusted = adjusted + e / (e + negative) / len(moved[1 - j][i])
            total = total - torch.log(adjusted)
    return total


def uniformity(strata: Tensor, u: float) -> Tensor:
    """L_uni (eq. 9) of one image: strata (n, c)."""
    total = torch.zeros((), dtype=torch.float64)
    for a in strata:
        for b in strata:
            total = total + torch.exp(2 * u * (a * b).sum() - 2 * u)
    return torch.log(total)


def moco(query: Tensor, key: Tensor, queue: Rows, negatives: Rows, alpha: float, tau: float) -> Tensor:
    """MoCo's loss of one query with non-semantic negatives: logits [q.k, q.queue, alpha q.t] / tau."""
    logits = [sim(query, key)] + [sim(query, other) for other in queue] + [alpha * sim(query, t) for t in negatives]
    return -logits[0] / tau + torch.log(torch.stack([torch.exp(logit / tau) for logit in logits]).sum())


def byol(prediction: Tensor, key: Tensor, negatives: Rows, alpha: float) -> Tensor:
    """BYOL's loss of one prediction, less alpha times the mean squared distance to its non-semantic negatives."""
    unit = lambda v: v / (v * v).sum().sqrt()  # noqa: E731
    apart = [((unit(prediction) - unit(t)) ** 2).sum() for t in negatives]
    return ((unit(prediction) - unit(key)) ** 2).sum() - alpha * sum(apart) / max(1, len(apart))


def learning_rate(iteration: int, *, base: float, epochs: int, batches: int) -> float:
    """The rate of W-MSE's code: 500 iterations of linear warm-up, x 0.2 at 50 and at 25 epochs before the end."""
    rate = base * (iteration + 1) / 500 if iteration < 500 else base
    epoch = iteration // batches
    return rate * math.prod(0.2 for before in (50, 25) if epoch >= epochs - before)
