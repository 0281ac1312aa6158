"""Accuracies and their differences, with 95 % percentile bootstrap intervals over images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from icl_msr.core.randomness import integers, keys


class Interval(NamedTuple):
    """A mean and its 95 % interval, in the unit of the values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """A bootstrap that resamples images with replacement, `resamples` times.

    The draws depend only on `seed` and on the number of images. So the results of different encoders, classifiers or
    splits on the same images are resampled in the same way and can be compared.
    """

    resamples: int
    seed: int

    def mean(self, values: Tensor) -> Interval:
        """Return the mean of `values` (n,), bool or small whole numbers, one for each image, with its interval."""
        return _interval(values.float().mean(), self._means(values))

    def difference(self, first: Tensor, second: Tensor, *, paired: bool) -> Interval:
        """Return the mean of `first` (n,) minus the mean of `second` (m,), with its interval.

        If `paired`, position i is the same object in both (n = m), and both are drawn together; else independently.
        """
        if paired:
            return self.mean(first.float() - second.float())
        centre = first.float().mean() - second.float().mean()
        return _interval(centre, self._means(first) - self._means(second, stream=1))

    def ratio(self, first: Tensor, second: Tensor) -> Interval:
        """Return the mean of `first` (n,) divided by the mean of `second` (n,), with its interval, drawn together."""
        return self.jointly([first, second], lambda means: means[0] / means[1])

    def jointly(self, columns: Sequence[Tensor], combine: Callable[[Tensor], Tensor]) -> Interval:
        """Return a statistic of the means of several values of the same images, which are drawn together.

        `columns` are values (n,). `combine` maps means (columns, resamples) to the statistic (resamples,). Resamples
        for which it is not finite are left out.
        """
        centre = combine(torch.stack([column.float().mean().cpu() for column in columns])[:, None])
        resampled = combine(torch.stack([self._means(column) for column in columns]))
        return _interval(centre[0], resampled[resampled.isfinite()])

    def of_parts(self, parts: Sequence[Tensor], combine: Callable[[Tensor], Tensor]) -> Interval:
        """Return a statistic of the means of several sets of images, with its interval.

        `parts` are values (n,), with an n of its own for each set. Each set is resampled by itself. `combine` maps
        means (parts, resamples) to the statistic (resamples,), such as the smallest.
        """
        centre = combine(torch.stack([part.float().mean().cpu() for part in parts])[:, None])
        resampled = torch.stack([self._means(part, stream) for stream, part in enumerate(parts)])
        return _interval(centre[0], combine(resampled))

    def _means(self, values: Tensor, stream: int = 0) -> Tensor:
        """Return the mean of each resample, (resamples,). Sums of whole numbers are exact in float32."""
        return _counts(len(values), self.resamples, self.seed, stream) @ values.float().cpu() / len(values)


@lru_cache(maxsize=2)
def _counts(images: int, resamples: int, seed: int, stream: int) -> Tensor:
    """Return the number of times that each image is drawn: float32 (resamples, images)."""
    counts = torch.zeros(resamples, images)
    rows = max(1, 2**20 // images)
    key = keys(seed, stream, torch.arange(resamples), view=-3)
    for part, part_key in zip(torch.split(counts, rows), torch.split(key, rows), strict=True):
        drawn = integers(part_key, images) * images >> 32
        part.scatter_add_(1, drawn, torch.ones_like(part))
    return counts


def _interval(centre: Tensor, resampled: Tensor) -> Interval:
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975])).tolist()
    return Interval(centre.item(), low, high)
