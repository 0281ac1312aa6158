"""Tables of many runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icl_msr.core.records import Measurement
from icl_msr.core.tables import Cell, Column, Line, Table
from icl_msr.report import words
from icl_msr.report.differences import Compared, chance, compare
from icl_msr.report.runs import GAIN
from icl_msr.report.summary import CONDITIONS, Configuration, Statistic, Summary, TwoByTwo, best, heading, headline

READING = (
    "% or points, mean ± standard deviation over n seeds; classifiers are fitted on train, or on the balanced split "
    "where it is named. gain: trained minus untrained. The best mean of a column is bold; differences within the "
    "standard deviations mean nothing."
)


def dataset_tables(summary: Summary, dataset: str) -> list[Table]:
    """Make the tables of one data set: the headline, the differences, and the 2 x 2 table if its runs exist."""
    rows = summary.by_dataset()[dataset]
    found = [headline_table(dataset, rows)]
    if compared := compare(rows, headline(rows), summary.against):
        found.append(difference_table(compared))
    if joined := summary.joined(dataset):
        found.append(two_by_two_table(joined))
    return found


def headline_table(dataset: str, rows: Sequence[Configuration]) -> Table:
    """Make the table of the numbers that a reader looks for first, with a line per configuration."""
    records = headline(list(rows))
    winners = {record: best(record, list(rows)) for record in records}
    lines = []
    for row in rows:
        n = len(row.runs)
        cells = [_statistic(record, row.metrics.get(record), winners[record] is row) for record in records]
        lines.append(Line([*_words(row.labels.values()), Cell(str(n), n), *cells]))
    columns = [*(Column(label, words=True) for label in rows[0].labels), Column("n"), *_heads(records)]
    return Table("headline", dataset, columns, lines, note=READING)


def difference_table(compared: Sequence[Compared]) -> Table:
    """Make the table of paired differences. Those whose interval excludes zero are bold."""
    records = list(dict.fromkeys(record for row in compared for record in row.differences))
    lines = []
    for row in compared:
        cells = []
        for record in records:
            found = row.differences.get(record)
            if found is None:
                cells.append(Cell())
                continue
            bounds = f"{found.low:.1f} to {found.high:.1f}".replace("-", "−")
            cells.append(Cell(words.points(found.mean), found.mean, bounds, f"({bounds})", found.real))
        lines.append(Line([*_words([row.configuration.label, row.against.label]), *cells]))
    columns = [Column("", words=True), Column("minus", words=True), *_heads(records)]
    return Table("differences", "Differences", columns, lines, note=chance(compared))


def two_by_two_table(tables: Sequence[TwoByTwo]) -> Table:
    """Make the table of accuracies by pre-training condition and test condition."""
    lines = [
        Line(
            [
                *_words([*joined.labels.values(), str(joined.classifier)]),
                *(Cell(str(joined.cells[condition]), joined.cells[condition].mean) for condition in CONDITIONS),
            ]
        )
        for joined in tables
    ]
    columns = [Column(label, words=True) for label in (*tables[0].labels, "classifier")]
    columns += [Column(f"{trained} / {tested}") for trained, tested in CONDITIONS]
    note = "full is the whole image, fg its foreground; classifiers are fitted on the training set."
    return Table("two-by-two", "Pre-trained on / tested on, %", columns, lines, note=note)


def everything_table(rows: Sequence[Configuration]) -> Table:
    """Make the table of everything measured, with a line per number and a column per configuration."""
    lines = []
    for record in everything(rows):
        what, how = heading(record)
        cells = [_statistic(record, row.metrics.get(record)) for row in rows]
        lines.append(Line([*_words([what, how]), *cells], faint=record.encoder == "untrained"))
    columns = [Column("measured", words=True), Column("by", words=True), *(Column(row.label) for row in rows)]
    return Table("everything", "Everything measured", columns, lines, folded=True)


def runs_table(summary: Summary, links: Mapping[Path, str]) -> Table:
    """Make the table of the runs. `links` maps their folders to their pages."""
    lines = []
    for configuration in summary.configurations:
        for run in configuration.runs:
            found, loss = run.outcome, run.curves.get("loss")
            rate, seconds = found.images_per_second, found.wall_time_s
            cells = [
                Cell(found.name, found.name, link=links.get(run.path, "")),
                *_words([configuration.label]),
                Cell(str(found.seed), found.seed),
                Cell(f"{loss.values[0]:.3f} to {loss.values[-1]:.3f}") if loss else Cell(),
                Cell(f"{rate:,.0f}", rate) if rate else Cell(),
                Cell(words.duration(seconds), seconds) if seconds else Cell(),
            ]
            lines.append(Line(cells))
    columns = [Column("run", words=True), Column("configuration", words=True), Column("seed")]
    columns += [Column("loss, first to last"), Column("images / s"), Column("wall time")]
    return Table("runs", "The runs", columns, lines)


def everything(rows: Sequence[Configuration]) -> list[Measurement]:
    """Return everything that was measured on one data set."""
    return list(dict.fromkeys(record for row in rows for record in row.metrics))


def flat_summary(summary: Summary) -> Table:
    """Make the table for programs, with a line per configuration, and columns for the mean and std of every number."""
    labels = dict.fromkeys(label for configuration in summary.configurations for label in configuration.labels)
    rows = []
    for configuration in summary.configurations:
        row: dict[str, Any] = {"dataset": configuration.dataset}
        row |= {label: configuration.labels.get(label) for label in labels}
        row |= {"n": len(configuration.runs), "seeds": " ".join(str(run.outcome.seed) for run in configuration.runs)}
        for record, found in configuration.metrics.items():
            row |= {told(record): found.mean, f"{told(record)} std": found.std}
        rows.append(row)
    return Table.of("summary", rows)


def flat_differences(summary: Summary) -> Table:
    """Make the table for programs, with a line per paired difference."""
    rows = [
        {"dataset": dataset, "configuration": row.configuration.label, "minus": row.against.label}
        | {"metric": told(record)}
        | asdict(difference)
        | {"real": difference.real}
        for dataset, rows in summary.by_dataset().items()
        for row in compare(rows, everything(rows), summary.against)
        for record, difference in row.differences.items()
    ]
    return Table.of("differences", rows)


def told(record: Measurement) -> str:
    """Return the name of a number as a user types it, with the encoder if it is not the trained one."""
    return record.name if record.encoder == "trained" else f"{record.name} ({record.encoder})"


def _words(texts: Any) -> list[Cell]:
    return [Cell(text, text) for text in texts]


def _heads(records: Sequence[Measurement]) -> list[Column]:
    return [Column(*heading(record)) for record in records]


def _statistic(record: Measurement, found: Statistic | None, best: bool = False) -> Cell:
    if found is None:
        return Cell()
    text = str(found)
    if record.encoder == GAIN:
        text = words.points(found.mean) + text[len(f"{found.mean:.1f}") :]
    return Cell(text, found.mean, strong=best)
