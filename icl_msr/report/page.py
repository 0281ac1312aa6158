"""The two self-contained HTML pages, for one run and for many."""

import base64
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from icl_msr.core.records import ACCURACY, GAP, MEANINGS, TRAINED, UNTRAINED, Measurement, Outcome
from icl_msr.core.saved import flatten
from icl_msr.core.tables import Table
from icl_msr.report import plots, words
from icl_msr.report.plots import Dot, Plot, Series
from icl_msr.report.runs import GAIN, Curve, Run
from icl_msr.report.summary import Configuration, Statistic, Summary, comparison, heading, headline
from icl_msr.report.summary_tables import dataset_tables, everything_table, runs_table
from icl_msr.report.tables import charts, tables

SAID: dict[str, Callable[[Any], list[str]]] = {"strata": words.strata}
"""Functions that write sentences about the records of a kind."""


@dataclass(frozen=True)
class Section:
    """The section of a page about one kind of record."""

    table: Table
    said: str
    plots: list[Plot]


def run_page(run: Run) -> str:
    """Return the HTML page of one run."""
    outcome = run.outcome
    sections = [_section(table, outcome) for table in tables(outcome)]
    return (
        _environment()
        .get_template("run.html")
        .render(
            run=run,
            outcome=outcome,
            answer=words.answer(outcome),
            warning=words.faint_meta_signal(run.curves, run.config.get("regularizer") or {}),
            tiles=_tiles(outcome),
            sections=[section for section in sections if not section.table.folded],
            folded=[section for section in sections if section.table.folded],
            curve_plots=_curve_plots(run.curves),
            pictures=[(picture.file.stem, picture.caption, _png(picture.file)) for picture in run.pictures],
            settings=_settings_cards(run),
            facts=_facts(run),
            environment=flatten(run.environment),
        )
    )


def _section(table: Table, outcome: Outcome) -> Section:
    records = outcome.records
    layout = records.layouts.get(table.name)
    drawn = charts(layout, records.where(table.name), outcome.chance) if layout else []
    return Section(table, " ".join(SAID[table.name](records)) if table.name in SAID else "", drawn)


def summary_page(summary: Summary, folder: Path, pictures: Mapping[str, Mapping[str, Path]]) -> str:
    """Return the HTML page of many runs.

    Args:
        summary: the content.
        folder: where the page will lie. Links to the runs' pages are relative to it.
        pictures: PNG files by data set and title.
    """
    datasets = {
        dataset: {
            "tables": dataset_tables(summary, dataset),
            "plots": [_comparison(record, rows) for record in headline(rows)],
            "races": _races(rows),
            "pictures": [(title, _png(file)) for title, file in pictures.get(dataset, {}).items()],
            "comparison": comparison(rows),
            "everything": everything_table(rows),
        }
        for dataset, rows in summary.by_dataset().items()
    }
    links = {
        run.path: os.path.relpath(run.path / "report.html", folder)
        for configuration in summary.configurations
        for run in configuration.runs
        if (run.path / "report.html").exists()
    }
    best = [(trial, os.path.relpath(Path(trial.folder) / "report.html", folder)) for trial in summary.best]
    return (
        _environment()
        .get_template("summary.html")
        .render(summary=summary, datasets=datasets, best=best, runs=runs_table(summary, links))
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("icl_msr.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"readable": words.readable}
    return environment


def _tiles(outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return the main numbers of the answer as (number, description, number of the untrained encoder)."""
    records = outcome.records
    classifier = words.main_classifier(records)
    if classifier is None:
        return []
    tiles = []
    gap, untrained = (words.telling_gap(records, classifier, encoder) for encoder in (TRAINED, UNTRAINED))
    if gap is not None:
        beside = f"untrained {words.points(-(untrained.value or 0.0))}" if untrained else ""
        what = f"points when {MEANINGS[gap.split, gap.minus]}"
        tiles.append((words.points(-(gap.value or 0.0)), what, beside))
    worst = records.find("groups", metric="worst", classifier=str(classifier), fitted_on="train", encoder=TRAINED)
    biased = records.find("shape", metric="shape_bias", encoder=TRAINED)
    for record, what in (
        (worst, "right on the worst group"),
        (biased, "by the shape, where the texture contradicts it"),
    ):
        if record is not None:
            tiles.append((words.percent(record.value), what, ""))
    for split, fitted_on, what in (
        ("only_bg", "train", "right from the background alone"),
        ("mixed_rand", "balanced", "of objects read, when the probe cannot use the background"),
        ("only_fg", "train", "right from the object alone"),
    ):
        known = {"split": split, "classifier": str(classifier), "fitted_on": fitted_on}
        own, other = (records.find(ACCURACY.kind, encoder=encoder, **known) for encoder in (TRAINED, UNTRAINED))
        if own is not None:
            tiles.append((words.percent(own.value), what, f"untrained {words.percent(other.value)}" if other else ""))
    return tiles


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
            "that is most similar (hardest). If its own lie above these, they are the harder ones.",
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


def _settings_cards(run: Run) -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """Return cards (group, choice, keys) for the config, and for the values derived from it."""
    cards, loose = [], []
    for group, content in run.config.items():
        if isinstance(content, dict):
            keys = [(key, value) for key, value in flatten(content).items() if not key.endswith("_target_")]
            cards.append((group, run.outcome.choices.get(group) or "", keys))
        else:
            loose.append((group, content))
    derived = [(key.replace("_", " "), value) for key, value in flatten(run.outcome.derived).items()]
    extra = [("everything else", "", loose)] if loose else []
    return cards + extra + ([("derived", "computed from the above", derived)] if derived else [])


def _facts(run: Run) -> list[tuple[str, str]]:
    outcome, loss = run.outcome, run.curves.get("loss")
    facts = [
        ("parameters", outcome.parameters and f"{outcome.parameters:,}"),
        ("wall time", outcome.wall_time_s and words.duration(outcome.wall_time_s)),
        ("images per second", outcome.images_per_second and f"{outcome.images_per_second:,.0f}"),
        ("peak memory", outcome.peak_memory_mb and f"{outcome.peak_memory_mb:,.0f} MB"),
        ("loss, first to last", loss and f"{loss.values[0]:.3f} to {loss.values[-1]:.3f}"),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _comparison(record: Measurement, rows: list[Configuration]) -> Plot:
    """Draw means over seeds with one standard deviation, and single seeds as ticks."""
    cells = [_mean_dot(row.metrics.get(record)) for row in rows]
    name, how = heading(record)
    points = record.unit == "points" or record.encoder == GAIN
    series = [Series("mean", cells, 1 if record.kind == GAP.kind else 0)]
    seeds = any(c is not None and c.single for c in cells)
    return plots.dots(
        f"{name} ({how})" if how else name,
        [row.label for row in rows],
        series,
        "points" if points else "accuracy, %" if record.kind == ACCURACY.kind else "%",
        0.0 if points else None,
        note="Dot: mean. Bar: one standard deviation. Ticks: seeds." if seeds else "",
    )


def _races(rows: list[Configuration]) -> list[Plot]:
    """Draw the online kNN accuracy of each configuration during training, averaged over seeds."""
    curves = {row.label or row.runs[0].outcome.name: _mean_curve(row, "online/knn") for row in rows}
    found = {name: curve for name, curve in curves.items() if curve is not None and len(curve.steps) > 1}
    note = "On a held-out part of train; means over seeds, best last value first."
    return [plots.race("Online kNN during training", found, "accuracy, %", note)] if len(found) > 1 else []


def _mean_curve(configuration: Configuration, name: str) -> Curve | None:
    """Return the mean of a curve over seeds, in per cent, at the steps that all seeds have."""
    seeds = [run.curves[name] for run in configuration.runs if name in run.curves]
    if not seeds:
        return None
    steps = [step for step in seeds[0].steps if all(step in curve.steps for curve in seeds)]
    at = [dict(zip(curve.steps, curve.values, strict=True)) for curve in seeds]
    return Curve(steps, [100 * sum(values[step] for values in at) / len(at) for step in steps])


def _mean_dot(statistic: Statistic | None) -> Dot | None:
    if statistic is None or statistic.std is None:
        return None if statistic is None else Dot(statistic.mean)
    mean, std = statistic.mean, statistic.std
    return Dot(mean, mean - std, mean + std, statistic.values)


def _png(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
