"""Paired differences between configurations, by seed, or by image if there is only one seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icl_msr.core.errors import UserError
from icl_msr.core.records import ACCURACY, Measurement
from icl_msr.core.storage import readable
from icl_msr.report.runs import GAIN, WITHOUT, Run
from icl_msr.report.summary import Configuration

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, in percentage points, with its 95 % interval."""

    mean: float
    low: float
    high: float
    over: Literal["seeds", "images"]
    n: int
    """Number of pairs."""
    detectable: float
    """The smallest true difference that would be found with 80 % power, given this number of pairs and this spread."""

    @property
    def real(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:.1f} to {self.high:.1f})".replace("-", "−")


@dataclass(frozen=True)
class Compared:
    """A configuration compared with another one."""

    configuration: Configuration
    against: Configuration
    differences: Mapping[Measurement, Difference]


def paired(values: Sequence[float]) -> Difference | None:
    """Return the mean of differences in points, one per seed, with Student's t interval; None for fewer than two."""
    from scipy.special import nctdtrinc, stdtrit

    n = len(values)
    if n < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    reach = float(stdtrit(n - 1, 0.975))
    found = float(
        nctdtrinc(n - 1, 0.2, reach)
    )  # with this mean of a noncentral t, 80 % of the values lie above `reach`
    return Difference(mean, mean - reach * error, mean + reach * error, "seeds", n, found * error)


def compare(
    rows: Sequence[Configuration], metrics: Sequence[Measurement], against: str | None = None
) -> list[Compared]:
    """Compare every configuration of one data set with its baseline, in those of the `metrics` that both have.

    The baseline of a row has the same labels, but `none` for every label that can be `none`. If no label can be `none`,
    the baseline is the first row. `against` chooses one baseline for all rows: the row whose label contains it.

    Raises:
        UserError: no label contains `against`, or several do.
    """
    fixed = None if against is None else _named(rows, against)
    found = []
    for row in rows:
        base = fixed or _baseline(row, rows)
        if base is row:
            continue
        differences = {metric: _difference(row, base, metric) for metric in metrics}
        known = {metric: difference for metric, difference in differences.items() if difference is not None}
        if known:
            found.append(Compared(row, base, known))
    return found


def chance(compared: Sequence[Compared]) -> str:
    """Return the note on the pairing, on the intervals that exclude zero, and on the number expected by chance."""
    every = [difference for row in compared for difference in row.differences.values()]
    images = any(difference.over == "images" for difference in every)
    pairs = "image by image (one seed, so not over trainings)" if images else "seed by seed (Student's t)"
    return (
        f"Differences in points, paired {pairs}, with 95 % intervals. {sum(d.real for d in every)} of {len(every)} "
        f"exclude zero; about {len(every) / 20:.1f} would if nothing differed."
    )


def _named(rows: Sequence[Configuration], against: str) -> Configuration:
    exact = [row for row in rows if against in (row.label, *row.labels.values())]
    candidates = exact or [row for row in rows if against in row.label]
    if len(candidates) != 1:
        which = "no row" if not candidates else f"{len(candidates)} rows"
        raise UserError(
            f"--against {against} names {which} of {rows[0].dataset}; write one of: {', '.join(r.label for r in rows)}."
        )
    return candidates[0]


def _baseline(row: Configuration, rows: Sequence[Configuration]) -> Configuration:
    may_be_none = {label for other in rows for label, value in other.labels.items() if value == "none"}
    plain = {label: "none" if label in may_be_none else value for label, value in row.labels.items()}
    return next((other for other in rows if may_be_none and other.labels == plain), rows[0])


def _difference(row: Configuration, base: Configuration, metric: Measurement) -> Difference | None:
    ours, theirs = ({run.outcome.seed: run for run in part.runs} for part in (row, base))
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[seed].numbers, theirs[seed].numbers) for seed in seeds]
    values = [mine[metric] - other[metric] for mine, other in pairs if metric in mine and metric in other]
    if len(seeds) == 1 and metric.kind == ACCURACY.kind and metric.encoder != GAIN:
        return over_images(ours[seeds[0]], theirs[seeds[0]], metric)
    return paired(values)


def over_images(run: Run, other: Run, metric: Measurement) -> Difference | None:
    """Compare accuracies of two runs on the same images; return None if their predictions cannot be compared."""
    import numpy as np

    hits = [_hits(part.path, metric) for part in (run, other)]
    if hits[0] is None or hits[1] is None or not np.array_equal(hits[0][0], hits[1][0]):
        return None
    n = _images(run, metric)
    if n < 2 or n != _images(other, metric):
        return None
    # A split may hold several versions of each image, one after the other. The interval is over images, not versions.
    apart = 100 * (hits[0][1].astype(float) - hits[1][1]).reshape(-1, n).mean(0)
    mean, error = float(apart.mean()), float(apart.std(ddof=1)) / math.sqrt(n)
    reach, power = (statistics.NormalDist().inv_cdf(p) for p in (0.975, 0.8))
    return Difference(mean, mean - reach * error, mean + reach * error, "images", n, (reach + power) * error)


def _images(run: Run, metric: Measurement) -> int:
    """Return the number of images behind an accuracy; 0 if it is not known."""
    found = (record.n for record in run.outcome.records.where(metric.kind) if record.identity == metric)
    return next(found, None) or 0


def _hits(folder: Path, metric: Measurement) -> "tuple[np.ndarray, np.ndarray] | None":
    """Return the labels of a run's test images, and whether each prediction is right; None if they are missing."""
    import numpy as np

    file = folder / "predictions.npz"
    key, labels = f"{metric.encoder}/{metric.name}", f"labels/{metric.split}"
    if not file.exists():
        return None
    with readable(file, WITHOUT), np.load(file) as saved:
        if key not in saved or labels not in saved:
            return None
        return saved[labels], saved[key] == saved[labels]
