"""Summaries of many runs: a row per configuration, with means and standard deviations over seeds."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icl_msr.core.figures import Overlays, grid
from icl_msr.core.records import ACCURACY, CHANCE, GAP, MEANINGS, TRAINED, UNTRAINED, Classifier, Measurement
from icl_msr.core.saved import flatten
from icl_msr.report.runs import GAIN, Failed, Run, find_runs
from icl_msr.report.searches import Trial, best_trials
from icl_msr.report.words import LOSSES, main_classifiers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = [("full", "full"), ("full", "fg"), ("fg", "fg"), ("fg", "full")]
"""Pairs (pre-trained on, tested on), in the order of the paper."""
SAME_CONFIGURATION = ("seed", "logger")
"""Top-level config entries that may differ between runs of one configuration."""


@dataclass(frozen=True)
class Statistic:
    """A number measured for several seeds."""

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
        """Sample standard deviation over seeds (n - 1 in the denominator); None for one seed."""
        return statistics.stdev(self.values) if self.n > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.1f}".replace("-", "−") + ("" if self.std is None else f" ± {self.std:.1f}")


@dataclass(frozen=True)
class Configuration:
    """Runs that differ only in their seed."""

    runs: list[Run]
    labels: dict[str, str]
    """Settings that distinguish this configuration from the others on the same data set."""
    metrics: dict[Measurement, Statistic]
    """Statistics by `Measurement.identity`. A gain is a record whose encoder is `GAIN`."""

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
    """Accuracies in % by pre-training condition and test condition (ICL-MSR, motivating experiment)."""

    dataset: str
    labels: dict[str, str]
    classifier: Classifier
    cells: dict[tuple[str, str], Statistic]
    """Accuracy by (pre-trained on, tested on), each either `full` or `fg`."""


@dataclass(frozen=True)
class Summary:
    """The content of a summary of many runs."""

    configurations: list[Configuration]
    two_by_two: list[TwoByTwo]
    failed: list[Failed]
    superseded: list[Path]
    """Runs that are left out because a newer run has the same configuration and seed."""
    against: str | None = None
    """The baseline of all configurations; see `differences.compare`."""
    best: list[Trial] = field(default_factory=list)
    """The best trials of the searches among the folders."""

    def by_dataset(self) -> dict[str, list[Configuration]]:
        """Return the configurations by data set. Accuracies on different data never share a table."""
        tables: dict[str, list[Configuration]] = {}
        for configuration in self.configurations:
            tables.setdefault(configuration.dataset, []).append(configuration)
        return tables

    def joined(self, dataset: str) -> list[TwoByTwo]:
        """Return the 2 x 2 tables of one data set."""
        return [table for table in self.two_by_two if table.dataset == dataset]


def summarise(paths: Iterable[Path], against: str | None = None) -> Summary:
    """Read all runs in the given folders, at any depth, and group the seeds of each configuration.

    `against` names the baseline of all configurations; see `differences.compare`.

    Raises:
        UserError: a path does not exist, or the folders hold no run.
    """
    paths = list(paths)
    runs, failed = find_runs(paths)
    trials, damaged = best_trials([*paths, *(run.path.parent for run in runs)])
    groups: dict[tuple[Any, ...], dict[int, Run]] = {}
    superseded = []
    for run in sorted(runs, key=lambda run: (run.path / "results.json").stat().st_mtime):
        seeds = groups.setdefault(_identity(run), {})
        if run.outcome.seed in seeds:
            superseded.append(seeds[run.outcome.seed].path)
        seeds[run.outcome.seed] = run
    members = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    configurations = []
    for dataset in dict.fromkeys(_dataset(seeds[0]) for seeds in members):
        same_data = [seeds for seeds in members if _dataset(seeds[0]) == dataset]
        columns = _differing([seeds[0] for seeds in same_data])
        configurations += [Configuration(runs, _labels(runs[0], columns), _statistics(runs)) for runs in same_data]
    configurations.sort(key=lambda c: (c.dataset, *(_order(value) for value in c.labels.values())))
    joined = _join_conditions(configurations)
    return Summary(configurations, joined, [*failed, *damaged], superseded, against, trials)


FURTHER = {
    ("groups", "worst"): "worst group",
    ("shape", "shape_bias"): "shape bias",
    ("attention", "share"): "on the object",
}
"""Headings of further numbers of the headline, by kind and metric."""
COLUMNS = 8
"""Largest number of columns of the headline, so that it stays on one screen, if there are further numbers."""


def heading(record: Measurement) -> tuple[str, str]:
    """Return the heading of a column as (what was measured, how)."""
    usual = record.kind in (ACCURACY.kind, GAP.kind)
    what = GAP.labels.get(record.splits, record.splits.replace(" - ", " − "))
    drawn = ""
    if (record.kind, record.metric) in FURTHER:
        what, drawn = FURTHER[record.kind, record.metric], record.told("map")
    elif not usual:
        what = " ".join(filter(None, (record.kind, record.metric, record.splits, *map(str, record.factors.values()))))
    fitted = "" if record.fitted_on == "train" else record.fitted_on
    encoder = "" if record.encoder == TRAINED else record.encoder
    return what, ", ".join(filter(None, (drawn, str(record.classifier or ""), fitted, encoder)))


def accuracy(split: str, classifier: Classifier | None, fitted_on: str, encoder: str = TRAINED) -> Measurement:
    """Return an accuracy record without its number, to look one up."""
    known = partial(Measurement, kind=ACCURACY.kind, value=None, split=split, classifier=classifier)
    return known(fitted_on=fitted_on, encoder=encoder)


def headline(configurations: list[Configuration]) -> list[Measurement]:
    """Return the few numbers that a reader looks for first, among those measured on this data set.

    They are the accuracy as usually reported, the accuracy of a probe that cannot use the background, the gain from
    training, and the loss without the background. The accuracy on the worst group, the shape bias, and the share of the
    class activation maps on the object follow.
    """
    every = dict.fromkeys(record for c in configurations for record in c.metrics)
    measured = {record: record for record in every if record.kind in (ACCURACY.kind, GAP.kind)}
    linear, knn = main_classifiers(measured)
    splits = {record.split for record in measured if record.kind == ACCURACY.kind}
    either = linear or knn

    def gap(split: str, minus: str) -> Measurement:
        return replace(accuracy(split, either, "train"), kind=GAP.kind, minus=minus, unit="points")

    if "mixed_rand" in splits:
        wanted = [
            accuracy("original", either, "train"),
            accuracy("mixed_rand", either, "balanced"),
            accuracy("mixed_rand", knn or either, "train"),
            accuracy("mixed_rand", knn or either, "train", GAIN),
            gap("mixed_same", "mixed_rand"),
            gap("only_bg", CHANCE),
        ]
    elif "fg" in splits:
        wanted = [
            accuracy("full", either, "train"),
            accuracy("fg", either, "train"),
            gap("full", "fg"),
            accuracy("full", knn or either, "train"),
            accuracy("full", knn or either, "train", GAIN),
        ]
    else:
        alike = [r for r in measured if r.classifier and r.classifier.family in ("linear", "finetune", "head")]
        main = {linear, knn, *(record.classifier for record in alike if record.classifier != linear)}
        wanted = [record for record in measured if record.encoder != UNTRAINED and record.classifier in main]
        if "corrupted" in splits:  # only the columns of Ge et al. 2021: there is no room for others
            wanted = [record for record in wanted if record.encoder == TRAINED and record.kind == ACCURACY.kind]
    found = [measured[record] for record in dict.fromkeys(wanted) if record in measured]
    further = _further(list(every), either)
    return [*found[: max(COLUMNS - len(further), 1)], *further] if further else found


def _further(every: list[Measurement], classifier: Classifier | None) -> list[Measurement]:
    """Return the further numbers of the headline: of the classifier, or of one that the encoder came with."""
    trained = [record for record in every if record.encoder == TRAINED]
    found = []
    for kind, metric in FURTHER:
        known = [record for record in trained if (record.kind, record.metric) == (kind, metric)]
        own = [record for record in known if record.classifier in (None, classifier)] or known[:1]
        found += own[-1:] if kind == "attention" else own  # Grad-CAM, if there is one
    return found


def best(record: Measurement, configurations: list[Configuration]) -> Configuration | None:
    """Return the configuration with the best mean: the highest accuracy, or the gap nearest to zero.

    Return None for fewer than two configurations, and for numbers whose larger values are neither better nor worse:
    accuracies on backgrounds or textures, and gains of gaps.
    """
    candidates = [c for c in configurations if record in c.metrics]
    less = record.better == "less"
    if len(candidates) < 2 or record.better == "neither" or (less and record.encoder == GAIN):
        return None
    return max(candidates, key=lambda c: -abs(c.metrics[record].mean) if less else c.metrics[record].mean)


def comparison(rows: list[Configuration]) -> str:
    """Return sentences on which configuration relies least on the background, and on the worst group, if measured."""
    gaps = {(record.split, record.minus): record for record in headline(rows)}
    gap = next((gaps[splits] for splits in LOSSES if splits in gaps), None)
    group = next((record for record in headline(rows) if record.kind == "groups" and record.fitted_on == "train"), None)
    said = []
    # Pre-training on the foreground only answers another question.
    asked = [row for row in rows if row.runs[0].outcome.train_on != "fg"]
    if gap is not None and len(order := _ordered(asked, gap)) > 1:
        said.append(
            f"When {MEANINGS[gap.split, gap.minus]}, {order[0].label} loses least on average, {order[0].metrics[gap]} "
            f"points, and {order[-1].label} most, {order[-1].metrics[gap]} points."
        )
    if group is not None and len(order := _ordered(asked, group)) > 1:
        said.append(
            f"On its worst group, {order[-1].label} is right most often, {order[-1].metrics[group]} %, and "
            f"{order[0].label} least often, {order[0].metrics[group]} %."
        )
    return " ".join(said)


def _ordered(rows: list[Configuration], record: Measurement) -> list[Configuration]:
    """Return the configurations for which a number was measured, the smallest mean first."""
    return sorted((row for row in rows if record in row.metrics), key=lambda row: row.metrics[record].mean)


def overlays(rows: list[Configuration]) -> dict[str, "Figure"]:
    """Draw, for each kind of map, the same images with the maps of every configuration, and of the untrained encoder.

    The first seed of a configuration stands for it. Those that were measured on other images are left out.
    """
    found = {row.label or row.runs[0].outcome.name: row.runs[0].overlays for row in rows}
    known = {label: one for label, one in found.items() if one is not None}
    first = next(iter(known.values()), None)
    alike = {} if first is None else {label: one for label, one in known.items() if _pixels(one) == _pixels(first)}
    if first is None or len(alike) < 2:
        return {}
    figures = {}
    for kind in first.maps:
        maps = {label: one.maps[kind][TRAINED] for label, one in alike.items() if TRAINED in one.maps.get(kind, {})}
        if UNTRAINED in first.maps[kind]:
            maps[UNTRAINED] = first.maps[kind][UNTRAINED]
        pairs = {label: (first.images, own) for label, own in maps.items()}
        figures[kind] = grid({"image": first.images, **pairs}, outlines=first.masks)
    return figures


def _pixels(of: Overlays) -> tuple[Any, bytes]:
    return of.images.shape, of.images.tobytes()


def _dataset(run: Run) -> str:
    return run.outcome.choices.get("dataset") or "data"


def _settings(run: Run) -> tuple[dict[str, str], dict[str, str]]:
    """Return the choice of every config group and all dotted keys, without those in `SAME_CONFIGURATION`."""
    choices = {
        group: str(choice).lower() if choice is None else choice
        for group, choice in run.outcome.choices.items()
        if group not in SAME_CONFIGURATION and not group.startswith("hydra")
    }
    config = {key: value for key, value in run.config.items() if key not in SAME_CONFIGURATION}
    return choices, {key: str(value) for key, value in flatten(config).items()}


def _identity(run: Run) -> tuple[Any, ...]:
    choices, keys = _settings(run)
    return tuple(sorted(choices.items())), tuple(sorted(keys.items()))


def _differing(runs: list[Run]) -> list[str]:
    """Return config groups whose choice differs, then dotted keys that differ between runs with the same choice.

    Keys that no command line names follow from the choices. They are left out if the other columns already distinguish
    the runs.
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
    return {column: choices.get(column, keys.get(column, "–")) for column in columns} or {"run": run.outcome.name}


def _order(label: str) -> tuple[int, float, str]:
    """Return a sorting key: `none` first, so that a baseline stands above the others, then numbers by size."""
    try:
        return 1, float(label), ""
    except ValueError:
        return (0 if label == "none" else 2), 0.0, label


def _statistics(runs: list[Run]) -> dict[Measurement, Statistic]:
    values: dict[Measurement, list[float]] = {}
    for run in runs:
        for record, value in run.numbers.items():
            values.setdefault(record, []).append(value)
    return {record: Statistic(tuple(seen)) for record, seen in values.items()}


def _join_conditions(configurations: list[Configuration]) -> list[TwoByTwo]:
    """Pair each configuration pre-trained on `full` images with the one that differs only in `train_on: fg`."""
    condition = "dataset.train_on"
    pairs: dict[tuple[Any, ...], dict[str, Configuration]] = {}
    for configuration in configurations:
        run = configuration.runs[0]
        choices, keys = _settings(run)
        rest = sorted((key, value) for key, value in keys.items() if key != condition)
        pair = pairs.setdefault((tuple(sorted(choices.items())), tuple(rest)), {})
        pair[run.outcome.train_on or "full"] = configuration
    tables = []
    for pair in pairs.values():
        if not {"full", "fg"} <= pair.keys():
            continue
        labels = {key: value for key, value in pair["full"].labels.items() if key != condition}
        accuracies = [record for record in pair["full"].metrics if record.kind == ACCURACY.kind]
        for classifier in dict.fromkeys(record.classifier for record in accuracies):
            cells = {
                (trained, tested): pair[trained].metrics.get(accuracy(tested, classifier, "train"))
                for trained, tested in CONDITIONS
            }
            complete = {key: cell for key, cell in cells.items() if cell is not None}
            if len(complete) == 4 and classifier is not None:
                labels = labels or {"run": pair["full"].runs[0].outcome.name}
                tables.append(TwoByTwo(pair["full"].dataset, labels, classifier, complete))
    return tables
