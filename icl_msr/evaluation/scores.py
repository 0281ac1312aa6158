"""What class scores say beside the top-1 accuracy. N images, K classes."""

import torch
from torch import Tensor


def in_top(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether the true class is among the k best of `scores` (N, K): bool (N,), with `labels` (N,) int64.

    Among equal scores the smaller class number is the better one, as in `argmax`.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | (earlier & (scores == own))).sum(1) < k


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many images of each true class (rows) are taken for each class (columns): int64 (K, K)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class(matrix: Tensor) -> list[float | None]:
    """Accuracy of each class, in [0, 1], from its `confusion` (K, K); None of a class without images."""
    shown = matrix.sum(1)
    return [int(right) / int(n) if n else None for right, n in zip(matrix.diag(), shown, strict=True)]


def most_confused(matrix: Tensor, pairs: int) -> list[tuple[int, int, int]]:
    """Up to `pairs` pairs (true class, predicted class, images), the largest first, of a `confusion` (K, K)."""
    wrong = (matrix - matrix.diag().diag()).flatten()
    order = torch.argsort(wrong, descending=True, stable=True)[:pairs]
    found = [(*divmod(int(i), len(matrix)), int(wrong[i])) for i in order]
    return [pair for pair in found if pair[2]]
