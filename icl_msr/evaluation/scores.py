"""Measures on class scores beside the top-1 accuracy. N images, K classes."""

import torch
from torch import Tensor


def in_top(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return bool (N,): whether the true class, `labels` int64 (N,), is among the k best of `scores` (N, K).

    Among equal scores, the smaller class number ranks higher, as in `argmax`.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | (earlier & (scores == own))).sum(1) < k


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the number of images by true class (rows) and predicted class (columns): int64 (K, K)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class(matrix: Tensor) -> list[float | None]:
    """Return the accuracy of each class, in [0, 1], from a `confusion` (K, K); None for a class without images."""
    shown = matrix.sum(1)
    return [int(right) / int(n) if n else None for right, n in zip(matrix.diag(), shown, strict=True)]


def most_confused(matrix: Tensor, pairs: int) -> list[tuple[int, int, int]]:
    """Return up to `pairs` triples (true class, predicted class, images) of a `confusion` (K, K), the largest first."""
    wrong = (matrix - matrix.diag().diag()).flatten()
    order = torch.argsort(wrong, descending=True, stable=True)[:pairs]
    found = [(*divmod(int(i), len(matrix)), int(wrong[i])) for i in order]
    return [pair for pair in found if pair[2]]
