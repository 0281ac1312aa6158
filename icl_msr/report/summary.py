"""Many runs -> one row per configuration, mean and standard deviation over seeds."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from icl_msr.report.runs import Failed, Results, Run, find_runs, flatten

GAIN = "trained - untrained"
CONDITIONS = [("full", "full"), ("full", "fg"), ("fg", "fg"), ("fg", "full")]
"""(pre-trained on, tested on), in the paper's order."""
SAME_CONFIGURATION = ("seed", "logger")
"""Top-level config entries that two runs of one configuration may differ in."""


class Metric(NamedTuple):
    """What was measured: `quantity` is a split (accuracy, %) or a gap (points)."""

    quantity: str
    classifier: str
    fitted_on: str
    encoder: str = "trained"

    @property
    def is_gap(self) -> bool:
        """Whether this is a difference between splits, where less is better."""
        return " - " in self.quantity or self.quantity == "bg_gap"

    def __str__(self) -> str:
        return f"{self.quantity} [{self.classifier} fitted on {self.fitted_on}, {self.encoder}]"


@dataclass(frozen=True)
class Statistic:
    """One number per seed."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds (n - 1 in the denominator); none for one seed."""
        return statistics.stdev(self.values) if self.n > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.1f}".replace("-", "−") + ("" if self.std is None else f" ± {self.std:.1f}")


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but their seed."""

    runs: list[Run]
    labels: dict[str, str]
    """What tells this configuration from the others on the same data set."""
    metrics: dict[Metric, Statistic]

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return _dataset(self.runs[0])

    @property
    def label(self) -> str:
        """The labels in one line."""
        return " · ".join(self.labels.values())


@dataclass(frozen=True)
class TwoByTwo:
    """Pre-training condition x test condition of one configuration (ICL-MSR, motivating experiment), in %."""

    dataset: str
    labels: dict[str, str]
    classifier: str
    cells: dict[tuple[str, str], Statistic]
    """(pre-trained on, tested on) -> accuracy; each either `full` or `fg`."""


@dataclass(frozen=True)
class Summary:
    """Everything a summary says."""

    configurations: list[Configuration]
    two_by_two: list[TwoByTwo]
    failed: list[Failed]
    superseded: list[Path]
    """Runs left out, because a newer one has the same configuration and seed."""
    against: str | None = None
    """What every configuration is compared with; see `differences.compare`."""

    def by_dataset(self) -> dict[str, list[Configuration]]:
        """Configurations of each data set: accuracies on different data are never put in one table."""
        tables: dict[str, list[Configuration]] = {}
        for configuration in self.configurations:
            tables.setdefault(configuration.dataset, []).append(configuration)
        return tables

    def joined(self, dataset: str) -> list[TwoByTwo]:
        """The 2 x 2 tables of one data set."""
        return [table for table in self.two_by_two if table.dataset == dataset]


def summarise(paths: Iterable[Path], against: str | None = None) -> Summary:
    """Read all runs in the folders given, at any depth, and join the seeds of each configuration.

    `against` names what all are compared with; see `differences.compare`.

    Raises:
        UserError: a path does not exist, or no run is inside any.
    """
    runs, failed = find_runs(list(paths))
    groups: dict[tuple[Any, ...], dict[int, Run]] = {}
    superseded = []
    for run in sorted(runs, key=lambda run: (run.path / "results.json").stat().st_mtime):
        seeds = groups.setdefault(_identity(run), {})
        if run.results.seed in seeds:
            superseded.append(seeds[run.results.seed].path)
        seeds[run.results.seed] = run
    members = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    configurations = []
    for dataset in dict.fromkeys(_dataset(seeds[0]) for seeds in members):
        same_data = [seeds for seeds in members if _dataset(seeds[0]) == dataset]
        columns = _differing([seeds[0] for seeds in same_data])
        configurations += [Configuration(runs, _labels(runs[0], columns), _statistics(runs)) for runs in same_data]
    configurations.sort(key=lambda c: (c.dataset, *(_order(value) for value in c.labels.values())))
    return Summary(configurations, _join_conditions(configurations), failed, superseded, against)


def measurements(results: Results) -> dict[Metric, float]:
    """All accuracies (%) and gaps (points) of a run, and by how much the trained encoder is above the untrained."""
    found = {Metric(a.split, a.classifier, a.fitted_on, a.encoder): 100 * a.top1 for a in results.accuracies}
    found |= {Metric(g.gap, g.classifier, g.fitted_on, g.encoder): g.points for g in results.gaps}
    gains = {}
    for metric, value in found.items():
        reference = metric._replace(encoder="untrained")
        if metric.encoder == "trained" and reference in found:
            gains[metric._replace(encoder=GAIN)] = value - found[reference]
    return {metric: value for metric, value in (found | gains).items() if math.isfinite(value)}


def main_classifiers(metrics: Iterable[Metric]) -> tuple[str | None, str | None]:
    """The linear probe, or else what was fine-tuned, and the first kNN preset, where measured."""
    names = list(dict.fromkeys(metric.classifier for metric in metrics))
    fitted = (name for kind in ("linear", "finetune") for name in names if name.startswith(kind))
    return next(fitted, None), next((name for name in names if name.startswith("knn")), None)


def headline(configurations: list[Configuration]) -> list[Metric]:
    """The few metrics a reader looks for first, of those measured on this data set.

    Accuracy as usually reported, what a probe that cannot use the background reads of the object, what training added,
    and how much is lost with the background.
    """
    measured = dict.fromkeys(metric for c in configurations for metric in c.metrics)
    linear, knn = main_classifiers(measured)
    splits = {metric.quantity for metric in measured if not metric.is_gap}
    either = linear or knn or ""
    if "mixed_rand" in splits:
        wanted = [
            Metric("original", either, "train"),
            Metric("mixed_rand", either, "balanced"),
            Metric("mixed_rand", knn or either, "train"),
            Metric("mixed_rand", knn or either, "train", GAIN),
            Metric("bg_gap", either, "train"),
            Metric("only_bg - chance", either, "train"),
        ]
    elif "fg" in splits:
        wanted = [
            Metric("full", either, "train"),
            Metric("fg", either, "train"),
            Metric("full - fg", either, "train"),
            Metric("full", knn or either, "train"),
            Metric("full", knn or either, "train", GAIN),
        ]
    else:
        main = (
            linear,
            knn,
            *(m.classifier for m in measured if m.classifier.startswith(("linear-", "finetune", "head"))),
        )
        wanted = [metric for metric in measured if metric.encoder != "untrained" and metric.classifier in main]
        if "corrupted" in splits:  # the columns of Ge et al. 2021, which leave no room for others
            wanted = [metric for metric in wanted if metric.encoder == "trained" and not metric.is_gap]
    return [metric for metric in dict.fromkeys(wanted) if metric in measured]


def best(metric: Metric, configurations: list[Configuration]) -> Configuration | None:
    """The configuration with the best mean: highest accuracy or gap nearest to zero; none among fewer than two.

    And none where more is not better or worse: what is told from a background or a texture, and gains of gaps.
    """
    candidates = [c for c in configurations if metric in c.metrics]
    neutral = metric.quantity.startswith(("conflict_", "only_")) and metric.quantity != "only_fg"
    if len(candidates) < 2 or neutral or (metric.is_gap and metric.encoder == GAIN):
        return None
    return max(candidates, key=lambda c: -abs(c.metrics[metric].mean) if metric.is_gap else c.metrics[metric].mean)


def _dataset(run: Run) -> str:
    return run.results.choices.get("dataset") or "data"


def _settings(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """(choice of every config group, every dotted key of the config), without what one configuration may vary."""
    choices = {
        group: str(choice).lower() if choice is None else choice
        for group, choice in run.results.choices.items()
        if group not in SAME_CONFIGURATION and not group.startswith("hydra")
    }
    config = {key: value for key, value in run.config.items() if key not in SAME_CONFIGURATION}
    return choices, {key: str(value) for key, value in flatten(config).items()}


def _identity(run: Run) -> tuple[Any, ...]:
    choices, keys = _settings(run)
    return tuple(sorted(choices.items())), tuple(sorted(keys.items()))


def _differing(runs: list[Run]) -> list[str]:
    """Config groups whose choice differs, then dotted keys that differ between runs of one and the same choice.

    Keys that no command line names follow from the choices, and stay out where the rest tells the runs apart.
    """
    settings = [_settings(run) for run in runs]
    groups = dict.fromkeys(group for choices, _ in settings for group in choices)
    columns = [group for group in groups if len({choices.get(group) for choices, _ in settings}) > 1]
    for key in dict.fromkeys(key for _, keys in settings for key in keys):
        group = key.split(".")[0]
        values: dict[str | None, set[str | None]] = {}
        for choices, keys in settings:
            values.setdefault(choices.get(group), set()).add(keys.get(key))
        if any(len(seen) > 1 for seen in values.values()):
            columns.append(key)
    typed = {word.partition("=")[0].lstrip("+") for run in runs for word in run.environment.get("command", "").split()}
    short = [c for c in columns if c in groups or any(f"{c}.".startswith(f"{word}.") for word in typed)]
    apart = {tuple(_labels(run, short).items()) for run in runs}
    return short if len(apart) == len(runs) else columns


def _labels(run: Run, columns: list[str]) -> dict[str, str]:
    choices, keys = _settings(run)
    return {column: choices.get(column, keys.get(column, "–")) for column in columns} or {"run": run.results.name}


def _order(label: str) -> tuple[int, float, str]:
    """`none` first, so that a baseline stands above what is compared with it; numbers by size."""
    try:
        return 1, float(label), ""
    except ValueError:
        return (0 if label == "none" else 2), 0.0, label


def _statistics(runs: list[Run]) -> dict[Metric, Statistic]:
    values: dict[Metric, list[float]] = {}
    for run in runs:
        for metric, value in measurements(run.results).items():
            values.setdefault(metric, []).append(value)
    return {metric: Statistic(tuple(seen)) for metric, seen in values.items()}


def _join_conditions(configurations: list[Configuration]) -> list[TwoByTwo]:
    """Pair each configuration pre-trained on `full` images with the one that differs in `train_on: fg` only."""
    condition = "dataset.train_on"
    pairs: dict[tuple[Any, ...], dict[str, Configuration]] = {}
    for configuration in configurations:
        run = configuration.runs[0]
        choices, keys = _settings(run)
        rest = sorted((key, value) for key, value in keys.items() if key != condition)
        pair = pairs.setdefault((tuple(sorted(choices.items())), tuple(rest)), {})
        pair[run.results.train_on or "full"] = configuration
    tables = []
    for pair in pairs.values():
        if not {"full", "fg"} <= pair.keys():
            continue
        labels = {key: value for key, value in pair["full"].labels.items() if key != condition}
        for classifier in dict.fromkeys(metric.classifier for metric in pair["full"].metrics):
            cells = {
                (trained, tested): pair[trained].metrics.get(Metric(tested, classifier, "train"))
                for trained, tested in CONDITIONS
            }
            complete = {key: cell for key, cell in cells.items() if cell is not None}
            if len(complete) == 4:
                labels = labels or {"run": pair["full"].runs[0].results.name}
                tables.append(TwoByTwo(pair["full"].dataset, labels, classifier, complete))
    return tables
