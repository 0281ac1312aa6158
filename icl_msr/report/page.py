"""The two self-contained pages: of one run, and of many."""

import base64
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table

from icl_msr.report import plots, words
from icl_msr.report.differences import chance, compare
from icl_msr.report.plots import Dot, Plot, Series
from icl_msr.report.runs import Accuracy, Curve, Gap, Look, Results, Run, flatten
from icl_msr.report.summary import (
    CONDITIONS,
    GAIN,
    Configuration,
    Metric,
    Statistic,
    Summary,
    best,
    headline,
    main_classifiers,
)
from icl_msr.report.tables import class_tables, tables, top_five_table

ENCODERS = ("trained", "untrained")


@dataclass(frozen=True)
class Row:
    """One line of the background matrix."""

    encoder: str
    classifier: str
    fitted_on: str
    cells: list[Accuracy | None]


@dataclass(frozen=True)
class GapRow:
    """One line of the table of gaps."""

    name: str
    symbols: str
    meaning: str
    classifier: str
    cells: list[Gap | None]


def run_page(run: Run) -> str:
    """HTML of one run."""
    results = run.results
    splits = list(dict.fromkeys(a.split for a in results.accuracies))
    return (
        _environment()
        .get_template("run.html")
        .render(
            run=run,
            results=results,
            answer=words.answer(results),
            warning=words.faint_meta_signal(run.curves, run.config.get("regularizer") or {}),
            tiles=_tiles(results),
            splits=splits,
            images={a.split: a.n for a in results.accuracies},
            matrix=matrix(results, splits),
            scale=_scale(results),
            matrix_plots=_matrix_plots(results, splits),
            gaps=_gap_rows(results),
            gap_columns=_gap_columns(results),
            shifted=any(gap.gap not in words.GAPS for gap in results.gaps),
            measures=[_plain(table) for table in tables(results)],
            details=[_plain(table) for table in _details(results)],
            curve_plots=_curve_plots(run.curves),
            look=results.strata,
            look_said=words.strata(results.strata) if results.strata else [],
            look_plot=_look_plot(results.strata) if results.strata else None,
            pictures=[(picture.file.stem, picture.caption, _png(picture.file)) for picture in run.pictures],
            settings=_settings_cards(run),
            facts=_facts(results),
            environment=flatten(run.environment),
        )
    )


@dataclass(frozen=True)
class Measure:
    """A table of the terminal for the page."""

    title: str
    header: list[str]
    rows: list[tuple[bool, list[str]]]
    """(whether it is of the untrained encoder, cells)."""
    left: int
    """Columns of words."""


def _plain(table: Table) -> Measure:
    cells = list(zip(*(map(str, column.cells) for column in table.columns), strict=True))
    rows = [(bool(row.style), list(line)) for row, line in zip(table.rows, cells, strict=True)]
    left = sum(column.justify == "left" for column in table.columns)
    return Measure(str(table.title).strip(), [str(column.header) for column in table.columns], rows, left)


def _details(results: Results) -> list[Table]:
    top_five = top_five_table(results.accuracies)
    return class_tables(results.per_class, results.classes) + ([] if top_five is None else [top_five])


def summary_page(summary: Summary, folder: Path) -> str:
    """HTML of many runs; the runs' own pages are linked relative to `folder`, where the page will lie."""
    tables = {
        dataset: {
            "rows": rows,
            "labels": list(rows[0].labels),
            "headline": headline(rows),
            "best": {metric: best(metric, rows) for metric in headline(rows)},
            "plots": [_comparison(metric, rows) for metric in headline(rows)],
            "races": _races(rows),
            "comparison": words.comparison(rows),
            "compared": compare(rows, headline(rows), summary.against),
            "joined": summary.joined(dataset),
            "all": list(dict.fromkeys(metric for row in rows for metric in row.metrics)),
        }
        for dataset, rows in summary.by_dataset().items()
    }
    links = {
        run.path: os.path.relpath(run.path / "report.html", folder)
        for configuration in summary.configurations
        for run in configuration.runs
        if (run.path / "report.html").exists()
    }
    return (
        _environment()
        .get_template("summary.html")
        .render(
            summary=summary, tables=tables, links=links, folder=folder, heading=metric_heading, conditions=CONDITIONS
        )
    )


def metric_heading(metric: Metric) -> tuple[str, str]:
    """(what, how) of a column."""
    what = words.GAPS[metric.quantity][0] if metric.quantity in words.GAPS else metric.quantity
    name = "BG-gap" if metric.quantity == "bg_gap" else what
    how = metric.classifier if metric.fitted_on == "train" else f"{metric.classifier}, {metric.fitted_on}"
    return name, how + (", gain" if metric.encoder == GAIN else ", untrained" if metric.encoder == "untrained" else "")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("icl_msr.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent,
        "points": words.points,
        "readable": words.readable,
        "duration": words.duration,
        "fitted": words.fitted,
        "stratum": _stratum,
        "signed": _signed,
    }
    environment.globals["interval"] = words.interval
    environment.globals["chance"] = chance
    environment.globals["GAIN"] = GAIN
    return environment


def _signed(statistic: Statistic) -> str:
    return words.points(statistic.mean) + ("" if statistic.std is None else f" ± {statistic.std:.1f}")


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """(number, what, beside the untrained encoder): the three numbers of the answer."""
    classifier = words.main_classifier(results) or ""
    tiles = []
    for name in words.LOSSES:
        gap, untrained = (words.find_gap(results, name, classifier, "train", encoder) for encoder in ENCODERS)
        if gap:
            beside = f"untrained {words.points(-untrained.points)}" if untrained else ""
            tiles.append((f"{words.points(-gap.points)}", f"points when {words.GAPS[name][1]}", beside))
            break
    for split, fitted_on, what in (
        ("only_bg", "train", "right from the background alone"),
        ("mixed_rand", "balanced", "of objects read, when the probe cannot use the background"),
        ("only_fg", "train", "right from the object alone"),
    ):
        accuracy, untrained_accuracy = (
            words.find_accuracy(results, split, classifier, fitted_on, encoder) for encoder in ENCODERS
        )
        if accuracy:
            beside = f"untrained {words.percent(untrained_accuracy.top1)}" if untrained_accuracy else ""
            tiles.append((words.percent(accuracy.top1), what, beside))
    return tiles


def _classifiers(names: Iterable[str]) -> list[str]:
    """The linear probe first, as the answer is about it."""
    return sorted(dict.fromkeys(names), key=lambda name: not name.startswith("linear"))


def matrix(results: Results, splits: list[str]) -> list[Row]:
    """The background matrix, by what was fitted on, then by classifier, trained above untrained."""
    rows = []
    sets = dict.fromkeys(a.fitted_on for a in results.accuracies)
    for fitted_on, classifier, encoder in product(
        sets, _classifiers(a.classifier for a in results.accuracies), ENCODERS
    ):
        cells = [words.find_accuracy(results, split, classifier, fitted_on, encoder) for split in splits]
        if any(cells):
            rows.append(Row(encoder, classifier, fitted_on, cells))
    return rows


def _scale(results: Results) -> tuple[float, float]:
    """Accuracies at which the heat colour starts and is full."""
    low = results.chance or 0.0
    return low, max([a.top1 for a in results.accuracies] + [low + 0.01])


def _matrix_plots(results: Results, splits: list[str]) -> list[Plot]:
    """One plot for each set the classifiers were fitted on."""
    linear, knn = main_classifiers(Metric(a.split, a.classifier, a.fitted_on) for a in results.accuracies)
    drawn = []
    for fitted_on in dict.fromkeys(a.fitted_on for a in results.accuracies):
        series = []
        for classifier, marker in ((linear, "o"), (knn, "D")):
            for encoder, colour in (("trained", 0 if marker == "o" else 1), ("untrained", None)):
                found = [words.find_accuracy(results, s, classifier or "", fitted_on, encoder) for s in splits]
                if any(found):
                    cells = [_dot(accuracy) for accuracy in found]
                    series.append(Series(f"{classifier}, {encoder}", cells, colour, encoder == "trained", marker))
        chance = None if results.chance is None else 100 * results.chance
        note = "Bars are 95 % intervals over images." + ("" if chance is None else " The dashed line is chance.")
        drawn.append(
            plots.dots(f"Fitted on {words.fitted(fitted_on)}", splits, series, "accuracy, %", chance, note=note)
        )
    return drawn


def _gap_rows(results: Results) -> list[GapRow]:
    columns = _gap_columns(results)
    rows: list[GapRow] = []
    for name in dict.fromkeys(gap.gap for gap in results.gaps):
        symbols, meaning = words.GAPS.get(name, (name, ""))
        for classifier in _classifiers(gap.classifier for gap in results.gaps if gap.gap == name):
            cells = [words.find_gap(results, name, classifier, *column) for column in columns]
            rows.append(GapRow(name, symbols, meaning, classifier, cells))
    return rows


def _gap_columns(results: Results) -> list[tuple[str, str]]:
    """(fitted on, encoder), the training set first and trained beside untrained."""
    found = {(gap.fitted_on, gap.encoder) for gap in results.gaps}
    sets = dict.fromkeys(gap.fitted_on for gap in results.gaps)
    return [(fitted_on, encoder) for fitted_on in sets for encoder in ENCODERS if (fitted_on, encoder) in found]


def _curve_plots(curves: dict[str, Curve]) -> list[Plot]:
    def chosen(*names: str) -> dict[str, Curve]:
        return {
            name: curve
            for name, curve in curves.items()
            if any(name == n or (n.endswith("/") and name.startswith(n)) for n in names)
        }

    norms = {name: curve for name, curve in curves.items() if name.endswith("grad_norm") and min(curve.values) > 0}
    alone = [(name, curve) for name, curve in curves.items() if name.startswith("msr/loss_")]
    panels = [
        ("Loss and its parts", chosen("loss", "loss/"), False, "", False),
        (
            "Accuracy on a held-out part of train",
            chosen("online/"),
            False,
            "Monitors only; nothing is chosen by them.",
            True,
        ),
        (
            "Gradient norms of the regularizer",
            norms,
            True,
            "If the meta gradient is far below that of uniformity, the regularizer learns from uniformity alone.",
            False,
        ),
        ("Uniformity of the channel weights", chosen("msr/uniformity"), False, "", False),
        (
            "The strata",
            chosen("msr/entropy", "msr/overlap", "msr/variation"),
            False,
            "Entropy of the squared weights over channels (1: uniform), mean cosine of two strata (0: disjoint), "
            "and how much they change from image to image (0: not at all).",
            True,
        ),
        (
            "L_msr with one stratum alone",
            {f"a_{name.removeprefix('msr/loss_')}": curve for name, curve in alone},
            False,
            "",
            False,
        ),
        (
            "Similarity of an image to its non-semantic negatives",
            chosen("negatives/"),
            False,
            "Mean cosine to its own, to its positive, to the bank or the other images, and to the hundredth of these "
            "that is most like it (hardest). Where its own lie above the hardest, they are what it is told from.",
            False,
        ),
        ("Embedding standard deviation", chosen("embedding_std"), False, "Near zero is collapse.", True),
        ("Learning rate", chosen("lr"), False, "", True),
        ("Images per second", chosen("images_per_second"), False, "", True),
    ]
    shown = {name for _, found, *_ in panels for name in found} | {name for name, _ in alone}
    for group, names in itertools.groupby(sorted(curves.keys() - shown), lambda name: name.partition("/")[0]):
        panels.append((f"Other numbers: {group}", chosen(*names), False, "", False))
    return [plots.lines(title, found, log, note, zero) for title, found, log, note, zero in panels if found]


def _look_plot(look: Look) -> Plot:
    cells = [Dot(100 * share.excess, 100 * share.excess_low, 100 * share.excess_high) for share in look.shares]
    return plots.dots(
        "Activation on the object, because of it",
        [_stratum(share.stratum) for share in look.shares],
        [Series("trained", cells, 0)],
        "points",
        0.0,
        note="Bars are 95 % intervals over images. On the dashed line a map does not see the object.",
    )


def _stratum(name: str) -> str:
    return f"stratum {name}" if name.isdigit() else name


def _settings_cards(run: Run) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """(group, choice, keys): the config as cards, and what follows from it."""
    cards, loose = [], []
    for group, content in run.config.items():
        if isinstance(content, dict):
            keys = [(key, value) for key, value in flatten(content).items() if not key.endswith("_target_")]
            cards.append((group, run.results.choices.get(group) or "", keys))
        else:
            loose.append((group, content))
    derived = [(key.replace("_", " "), value) for key, value in flatten(run.results.derived).items()]
    extra = [("everything else", "", loose)] if loose else []
    return cards + extra + ([("derived", "computed from the above", derived)] if derived else [])


def _facts(results: Results) -> list[tuple[str, str]]:
    facts = [
        ("parameters", results.parameters and f"{results.parameters:,}"),
        ("wall time", results.wall_time_s and words.duration(results.wall_time_s)),
        ("images per second", results.images_per_second and f"{results.images_per_second:,.0f}"),
        ("peak memory", results.peak_memory_mb and f"{results.peak_memory_mb:,.0f} MB"),
    ]
    first, final = results.first.get("loss"), results.final.get("loss")
    if first is not None and final is not None:
        facts.append(("loss, first epoch to last", f"{first:.3f} to {final:.3f}"))
    return [(name, value) for name, value in facts if value]


def _comparison(metric: Metric, rows: list[Configuration]) -> Plot:
    """Means over seeds with one standard deviation, the seeds as ticks."""
    cells = [_mean_dot(row.metrics.get(metric)) for row in rows]
    name, how = metric_heading(metric)
    points = metric.is_gap or metric.encoder == GAIN
    series = [Series("mean", cells, 1 if metric.is_gap else 0)]
    seeds = any(c is not None and c.single for c in cells)
    return plots.dots(
        f"{name} ({how})",
        [row.label for row in rows],
        series,
        "points" if points else "accuracy, %",
        0.0 if points else None,
        note="Dot: mean. Bar: one standard deviation. Ticks: seeds." if seeds else "",
    )


def _races(rows: list[Configuration]) -> list[Plot]:
    """How the online kNN of each configuration rose, averaged over seeds."""
    curves = {row.label or row.runs[0].results.name: _mean_curve(row, "online/knn") for row in rows}
    found = {name: curve for name, curve in curves.items() if curve is not None and len(curve.steps) > 1}
    note = "On a held-out part of train; means over seeds, best last value first."
    return [plots.race("Online kNN during training", found, "accuracy, %", note)] if len(found) > 1 else []


def _mean_curve(configuration: Configuration, name: str) -> Curve | None:
    """In per cent, over the steps that all seeds have."""
    seeds = [run.curves[name] for run in configuration.runs if name in run.curves]
    if not seeds:
        return None
    steps = [step for step in seeds[0].steps if all(step in curve.steps for curve in seeds)]
    at = [dict(zip(curve.steps, curve.values, strict=True)) for curve in seeds]
    return Curve(steps, [100 * sum(values[step] for values in at) / len(at) for step in steps])


def _dot(accuracy: Accuracy | None) -> Dot | None:
    if accuracy is None:
        return None
    low, high = (None if bound is None else 100 * bound for bound in (accuracy.low, accuracy.high))
    return Dot(100 * accuracy.top1, low, high)


def _mean_dot(statistic: Statistic | None) -> Dot | None:
    if statistic is None or statistic.std is None:
        return None if statistic is None else Dot(statistic.mean)
    mean, std = statistic.mean, statistic.std
    return Dot(mean, mean - std, mean + std, statistic.values)


def _png(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
