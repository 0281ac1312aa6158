"""Tables and plots of records, made from their layouts. No kind of record has to be known here."""

from collections.abc import Iterable, Sequence
from typing import Any

from icl_msr.core.records import ACCURACY, GAP, TRAINED, UNTRAINED, ByClass, Layout, Measurement, Outcome
from icl_msr.core.tables import Cell, Column, Line, Table
from icl_msr.report import plots, words
from icl_msr.report.plots import Dot, Plot, Series
from icl_msr.report.runs import Curve

SHOWN = 20
"""Largest number of classes in a table; if there are more, the best and the worst are shown."""
NARROW = 5
"""Largest number of columns for which a terminal has room for intervals."""
SERIES = 4
"""Largest number of series in a plot; if there are more, only the main classifiers are drawn."""


def tables(outcome: Outcome) -> list[Table]:
    """Make a table of every kind of record that has a layout, and the tables of the classes."""
    records = outcome.records
    first = sorted(records.layouts, key=lambda kind: kind not in (ACCURACY.kind, GAP.kind))
    found = [lay_out(records.layouts[kind], records.where(kind), outcome.chance) for kind in first]
    return [table for table in found if table.lines] + class_tables(records.by_class, outcome.classes)


def lay_out(layout: Layout, records: Sequence[Measurement], chance: float | None = None) -> Table:
    """Make the table of records of one kind. The scale of cell colours begins at `chance`."""
    lines: dict[tuple[Any, ...], dict[tuple[Any, ...], Measurement]] = {}
    for record in records:
        cells = lines.setdefault(_told(record, layout.rows), {})
        cells[_told(record, layout.columns)] = record
    columns = _ordered({_told(record, layout.columns): record for record in records}, layout.columns)
    words_of = [Column(layout.labels.get(by, by), words=True) for by in layout.rows]
    counts = [Column(layout.count)] if layout.count else []
    heads = [_head(layout, column) for column in columns]
    notes = (
        [Column(layout.notes, words=True, prose=True)]
        if layout.notes and any(record.note for record in records)
        else []
    )
    low = chance or 0.0
    high = max([record.value or 0.0 for record in records] + [low + 0.01])
    body = []
    for key in _ordered({key: next(iter(cells.values())) for key, cells in lines.items()}, layout.rows):
        found = lines[key]
        first = next(iter(found.values()))
        line = [_word(layout, value) for value in key]
        if counts:
            line.append(Cell("–" if first.n is None else f"{first.n:,}", first.n))
        for column in columns:
            cell = found.get(column)
            heat = None if cell is None or not layout.heat else ((cell.value or 0.0) - low) / (high - low)
            line.append(_number(cell, heat, margin=not layout.heat and len(columns) <= NARROW))
        if notes:
            note = "; ".join(dict.fromkeys(record.note for record in found.values() if record.note))
            line.append(Cell(note, note))
        body.append(Line(line, faint="encoder" in layout.rows and first.encoder == UNTRAINED))
    every = [*words_of, *counts, *heads, *notes]
    return Table(layout.kind, layout.title, every, body, about=layout.about, folded=layout.folded)


def _told(record: Measurement, by: Sequence[str]) -> tuple[Any, ...]:
    return tuple(record.told(one) for one in by)


def _ordered(keys: dict[tuple[Any, ...], Measurement], by: Sequence[str]) -> list[tuple[Any, ...]]:
    """Sort keys by each of their parts, in order of appearance, with the linear probe and the trained encoder first."""
    ranks: list[dict[Any, int]] = []
    for place, field in enumerate(by):
        seen: dict[Any, bool] = {}
        for key, record in keys.items():
            linear = record.classifier is not None and record.classifier.family == "linear"
            later = (field == "classifier" and not linear) or (field == "encoder" and record.encoder != TRAINED)
            seen.setdefault(key[place], later)
        ranks.append({value: rank for rank, value in enumerate(sorted(seen, key=seen.__getitem__))})
    return sorted(keys, key=lambda key: [rank[part] for rank, part in zip(ranks, key, strict=True)])


def _label(layout: Layout, value: Any) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return layout.labels.get(text, text)


def _word(layout: Layout, value: Any) -> Cell:
    return Cell(_label(layout, value), value, layout.details.get(str(value), ""))


def _head(layout: Layout, column: Sequence[Any]) -> Column:
    first, *rest = (value for value in column if value is not None)
    detail = ", ".join(_label(layout, value) for value in rest)
    return Column(_label(layout, first), detail, layout.details.get(str(first), ""))


def _number(record: Measurement | None, heat: float | None, *, margin: bool) -> Cell:
    if record is None:
        return Cell()
    low, high = record.scaled(record.low), record.scaled(record.high)
    known = low is not None and high is not None and record.value is not None
    half = f"±{(high - low) / 2:.1f}" if known and margin else ""  # type: ignore[operator]
    text = words.number(record, record.value)
    detail = words.interval(record) if known else ""
    return Cell(text, record.value, detail, half, heat=None if heat is None else min(max(heat, 0.0), 1.0))


def charts(layout: Layout, records: Sequence[Measurement], chance: float | None = None) -> list[Plot]:
    """Draw the plots of a layout, one for each panel. In plots of accuracies, `chance` is a dashed line."""
    chart = layout.chart
    if chart is None:
        return []
    chosen = [record for record in records if all(record.told(by) == value for by, value in chart.where.items())]
    panels: dict[Any, list[Measurement]] = {}
    for record in chosen:
        panels.setdefault(record.told(chart.panel) if chart.panel else None, []).append(record)
    drawn = []
    for value, found in panels.items():
        panel = layout.labels.get(chart.panel, chart.panel)
        title = f"{panel} {_label(layout, value)}".capitalize() if chart.panel else layout.title.removesuffix(", %")
        unit = {"fraction": "%", "points": "points"}.get(found[0].unit, "")
        series = _series(found, chart.series)
        places = list(dict.fromkeys(record.told(chart.axis) for record in found))
        at = {key: {record.told(chart.axis): record for record in line} for key, line in series.items()}
        names = {key: ", ".join(_label(layout, part) for part in key if part is not None) for key in series}
        if chart.shape == "lines":
            values = {
                name: Curve(
                    [float(place) for place in places if place in at[key]],
                    [at[key][place].shown or 0.0 for place in places if place in at[key]],
                )
                for key, name in names.items()
            }
            drawn.append(plots.lines(title, values, note=chart.note, axis=layout.labels.get(chart.axis, chart.axis)))
            continue
        reference = 0.0 if unit == "points" else 100 * chance if layout.kind == ACCURACY.kind and chance else None
        kinds = list(dict.fromkeys(tuple(p for p in key if p not in (TRAINED, UNTRAINED)) for key in series))
        dots = [
            Series(
                names[key],
                [_dot(at[key].get(place)) for place in places],
                None if UNTRAINED in key else kinds.index(tuple(p for p in key if p != TRAINED)),
                UNTRAINED not in key,
                "oDs^"[kinds.index(tuple(p for p in key if p not in (TRAINED, UNTRAINED))) % 4],
            )
            for key in series
        ]
        rows = [_label(layout, place) for place in places]
        drawn.append(plots.dots(title, rows, dots, unit, reference, note=chart.note))
    return drawn


def _series(records: Iterable[Measurement], by: Sequence[str]) -> dict[tuple[Any, ...], list[Measurement]]:
    series: dict[tuple[Any, ...], list[Measurement]] = {}
    for record in records:
        series.setdefault(_told(record, by), []).append(record)
    main = words.main_classifiers(record for line in series.values() for record in line)
    if len(series) > SERIES and any(main):
        series = {key: line for key, line in series.items() if line[0].classifier in main}
    return {key: series[key] for key in _ordered({key: line[0] for key, line in series.items()}, by)}


def _dot(record: Measurement | None) -> Dot | None:
    if record is None or record.value is None:
        return None
    return Dot(record.shown or 0.0, record.scaled(record.low), record.scaled(record.high))


def class_tables(by_class: Sequence[ByClass], classes: Sequence[str]) -> list[Table]:
    """Make tables of the accuracy by class and of the largest confusions on the first test split.

    The tables show the trained encoder, with the linear probe fitted on train, or with the first classifier if there is
    no linear probe.
    """
    rows = [row for row in by_class if (row.encoder, row.fitted_on, row.classes) == (TRAINED, "train", None)]
    if not rows:
        return []
    row = next((row for row in rows if row.classifier.family == "linear"), rows[0])
    where = f"{row.split}, {row.classifier}"
    named = zip(row.accuracies, classes, strict=False)
    ranked = sorted(((value, name) for value, name in named if value is not None), key=lambda pair: -pair[0])
    few = f": the best and the worst {SHOWN // 2} of {len(ranked)}" if len(ranked) > SHOWN else ""
    if few:
        ranked = ranked[: SHOWN // 2] + ranked[-SHOWN // 2 :]
    taken: dict[str, str] = {}
    for true, predicted, images in row.confused:
        taken.setdefault(true, f"{predicted} ({images})")
    first = Column("class", words=True)
    heads = [first, Column("accuracy, %"), Column("most often taken for", words=True)]
    lines = [
        Line([Cell(name, name), Cell(f"{100 * value:.1f}", value), Cell(taken.get(name, ""), taken.get(name, ""))])
        for value, name in ranked
    ]
    pairs = [Line([Cell(str(part), part) for part in pair]) for pair in row.confused]
    columns = [first, Column("taken for", words=True), Column("images")]
    return [
        Table("classes", f"Classes ({where}{few})", heads, lines, folded=True),
        Table("confusions", f"Largest confusions ({where})", columns, pairs, folded=True),
    ]
