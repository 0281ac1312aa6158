"""Summaries on the terminal and in files."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from icl_msr.report.differences import Compared, chance, compare
from icl_msr.report.page import matrix, metric_heading, summary_page
from icl_msr.report.runs import Results
from icl_msr.report.summary import CONDITIONS, Configuration, Metric, Summary, TwoByTwo, best, headline
from icl_msr.training.loggers import About, WeightsAndBiases

READING = (
    "% or points, mean ± standard deviation over n seeds; "
    "classifiers fitted on train, or on the balanced split where said; gain: trained minus untrained"
)


def matrix_table(results: Results) -> Table:
    """The background matrix of one run for the terminal, 80 columns wide: accuracy in %."""
    table = Table(title="Accuracy, %", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("fitted\non", "classifier", "encoder"):
        table.add_column(column, no_wrap=True)
    splits = list(dict.fromkeys(a.split for a in results.accuracies))
    for split in splits:
        table.add_column(split.replace("_", "\n"), justify="right", no_wrap=True, min_width=4)
    for row in matrix(results, splits):
        cells = (f"{100 * cell.top1:.1f}" if cell else "–" for cell in row.cells)
        table.add_row(row.fitted_on, row.classifier, row.encoder, *cells, style="dim" * (row.encoder == "untrained"))
    return table


def gap_table(results: Results) -> Table | None:
    """The gaps of one run for the terminal, in points with half the width of their interval; None without any."""
    if not results.gaps:
        return None
    table = Table(title="\nGaps, points", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("fitted\non", "classifier", "encoder"):
        table.add_column(column, no_wrap=True)
    for name in dict.fromkeys(gap.gap for gap in results.gaps):
        heading = "mixed_same\n- mixed_rand" if name == "bg_gap" else name.replace(" - ", "\n- ")
        table.add_column(heading, justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str], list[str]] = {}
    for gap in results.gaps:
        width = "" if gap.low is None or gap.high is None else f" ±{(gap.high - gap.low) / 2:.1f}"
        rows.setdefault((gap.fitted_on, gap.classifier, gap.encoder), []).append(f"{gap.points:.1f}{width}")
    for key in sorted(rows, key=lambda k: (k[0] != "train", not k[1].startswith("linear"), k[1], k[2])):
        table.add_row(*key, *rows[key], style="dim" * (key[2] == "untrained"))
    return table


def print_summary(summary: Summary, console: Console) -> None:
    """One table a data set, the 2 x 2 where it can be joined, and what failed."""
    for dataset, rows in summary.by_dataset().items():
        columns = headline(rows)
        winners = {metric: best(metric, rows) for metric in columns}
        table = Table(title=dataset, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="")
        for label in rows[0].labels:
            table.add_column(Text(label, style="bold"), overflow="fold")
        table.add_column(Text("n", style="bold"), justify="right")
        for metric in columns:
            name, how = metric_heading(metric)
            table.add_column(
                Text(name, style="bold") + Text("\n" + how.replace(", ", "\n"), style="dim"), justify="right"
            )
        for row in rows:
            cells = [
                Text(str(row.metrics.get(metric, "–")), style="bold" if winners[metric] is row else "")
                for metric in columns
            ]
            table.add_row(*row.labels.values(), str(len(row.runs)), *cells)
        console.print(table)
        console.print(Text(READING, style="dim"))
        console.print()
        if compared := compare(rows, columns, summary.against):
            console.print(_difference_table(compared))
            console.print(Text(chance(compared), style="dim"))
            console.print()
        if joined := summary.joined(dataset):
            console.print(_two_by_two_table(joined))
            console.print()
    for failed in summary.failed:
        console.print(Text(f"missing: {failed.path}: {failed.reason}", style="red"))
    for path in summary.superseded:
        console.print(Text(f"left out: {path}: a newer run has the same configuration and seed", style="dim"))


def _difference_table(compared: list[Compared]) -> Table:
    table = Table(title="Differences", title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="")
    for column in ("", "minus"):
        table.add_column(Text(column, style="bold"), overflow="fold")
    metrics = list(dict.fromkeys(metric for row in compared for metric in row.differences))
    for metric in metrics:
        name, how = metric_heading(metric)
        table.add_column(Text(name, style="bold") + Text("\n" + how.replace(", ", "\n"), style="dim"), justify="right")
    for row in compared:
        cells = [row.differences.get(metric) for metric in metrics]
        shown = [Text(str(cell), style="bold" * cell.real) if cell else Text("–") for cell in cells]
        table.add_row(row.configuration.label, row.against.label, *shown)
    return table


def _two_by_two_table(tables: list[TwoByTwo]) -> Table:
    table = Table(title="pre-trained on / tested on, %", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for label in [*tables[0].labels, "classifier"]:
        table.add_column(label)
    for trained, tested in CONDITIONS:
        table.add_column(f"{trained} / {tested}", justify="right")
    for joined in tables:
        table.add_row(*joined.labels.values(), joined.classifier, *(str(joined.cells[c]) for c in CONDITIONS))
    return table


def write_summary(summary: Summary, folder: Path) -> list[Path]:
    """Write `summary.csv`, `.md`, `.tex`, `.json` and `report.html` into the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "summary.csv": as_csv(summary),
        "summary.md": as_markdown(summary),
        "summary.json": as_json(summary),
        "report.html": summary_page(summary, folder.resolve()),
        "summary.tex": as_latex(summary),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8", newline="")
    return [folder / name for name in contents]


def summary_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row a configuration, by column; mean and std of every metric in columns of their own."""
    rows = []
    for configuration in summary.configurations:
        row: dict[str, Any] = {"dataset": configuration.dataset} | configuration.labels
        row["n"] = len(configuration.runs)
        row["seeds"] = " ".join(str(run.results.seed) for run in configuration.runs)
        for metric, found in configuration.metrics.items():
            row |= {f"{metric}": found.mean, f"{metric} std": found.std}
        rows.append(row)
    return rows


def difference_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row a paired difference: what is compared with what, in which metric, and its interval."""
    return [
        {"dataset": dataset, "configuration": row.configuration.label, "minus": row.against.label}
        | {"metric": str(metric)}
        | asdict(difference)
        | {"real": difference.real}
        for dataset, rows in summary.by_dataset().items()
        for row in compare(rows, everything(rows), summary.against)
        for metric, difference in row.differences.items()
    ]


def send(summary: Summary, folder: Path, project: str) -> None:
    """The summary as tables of a run of its own in W&B, in the mode that `conf/logger/wandb.yaml` calls auto."""
    about = About("summary", None, "summary", {"folder": str(folder)}, None)
    board = WeightsAndBiases(folder, about, project=project, entity=None, mode="auto", artifacts=False)
    board.log_tables({"summary": summary_rows(summary), "differences": difference_rows(summary)})
    board.close(0)


def as_csv(summary: Summary) -> str:
    """See `summary_rows`."""
    rows = summary_rows(summary)
    labels = dict.fromkeys(label for c in summary.configurations for label in ("dataset", *c.labels))
    columns = dict.fromkeys([*labels, "n", "seeds", *(column for row in rows for column in row)])
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def as_json(summary: Summary) -> str:
    """Everything, with the single values in the order of the seeds."""
    content = {
        "configurations": [
            {
                "dataset": configuration.dataset,
                "labels": configuration.labels,
                "runs": [str(run.path) for run in configuration.runs],
                "seeds": [run.results.seed for run in configuration.runs],
                "metrics": [
                    metric._asdict() | {"mean": s.mean, "std": s.std, "n": s.n, "values": s.values}
                    for metric, s in configuration.metrics.items()
                ],
            }
            for configuration in summary.configurations
        ],
        "differences": [
            {
                "dataset": dataset,
                "labels": row.configuration.labels,
                "against": row.against.labels,
                "differences": [
                    metric._asdict() | asdict(difference) | {"real": difference.real}
                    for metric, difference in row.differences.items()
                ],
            }
            for dataset, rows in summary.by_dataset().items()
            for row in compare(rows, everything(rows), summary.against)
        ],
        "two_by_two": [
            {
                "dataset": joined.dataset,
                "labels": joined.labels,
                "classifier": joined.classifier,
                **{
                    f"{trained}/{tested}": {"mean": s.mean, "std": s.std, "n": s.n, "values": s.values}
                    for (trained, tested), s in joined.cells.items()
                },
            }
            for joined in summary.two_by_two
        ],
        "failed": [{"path": str(failed.path), "reason": failed.reason} for failed in summary.failed],
        "superseded": [str(path) for path in summary.superseded],
    }
    return json.dumps(content, indent=2) + "\n"


def everything(rows: list[Configuration]) -> list[Metric]:
    """All that was measured on one data set."""
    return list(dict.fromkeys(metric for row in rows for metric in row.metrics))


def as_markdown(summary: Summary) -> str:
    """The tables of the terminal."""
    parts = []
    for dataset, rows in summary.by_dataset().items():
        parts.append(_markdown_table(dataset, rows))
        if compared := compare(rows, headline(rows), summary.against):
            parts.append(_markdown_differences(compared))
        if joined := summary.joined(dataset):
            parts.append(_markdown_two_by_two(joined))
    if summary.failed:
        parts.append("### Missing\n\n" + "\n".join(f"* `{failed.path}`: {failed.reason}" for failed in summary.failed))
    return "\n\n".join(parts) + "\n"


def _markdown_table(dataset: str, rows: list[Configuration]) -> str:
    columns = headline(rows)
    header = [*rows[0].labels, "n", *_column_names(columns)]
    lines = [
        [*row.labels.values(), str(len(row.runs)), *(str(row.metrics.get(metric, "–")) for metric in columns)]
        for row in rows
    ]
    return f"### {dataset}\n\n{_markdown(header, lines, len(rows[0].labels))}\n\n{READING}."


def _markdown_differences(compared: list[Compared]) -> str:
    header, lines = _difference_cells(compared, lambda text: f"**{text}**")
    return f"### Differences\n\n{_markdown(header, lines, 2)}\n\n{chance(compared)}"


def _difference_cells(compared: list[Compared], bold: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of text; what is real is bold."""
    metrics = list(dict.fromkeys(metric for row in compared for metric in row.differences))
    lines = []
    for row in compared:
        cells = [row.differences.get(metric) for metric in metrics]
        shown = ["–" if cell is None else bold(str(cell)) if cell.real else str(cell) for cell in cells]
        lines.append([row.configuration.label, row.against.label, *shown])
    return ["", "minus", *_column_names(metrics)], lines


def _column_names(metrics: list[Metric]) -> list[str]:
    return [f"{name} ({how})" for name, how in map(metric_heading, metrics)]


def as_latex(summary: Summary) -> str:
    """The same tables for a paper: booktabs, one environment each."""
    parts = ["% \\usepackage{booktabs}"]
    for dataset, rows in summary.by_dataset().items():
        columns = headline(rows)
        header = [*rows[0].labels, "n", *_column_names(columns)]
        lines = [
            [*row.labels.values(), str(len(row.runs)), *(str(row.metrics.get(metric, "–")) for metric in columns)]
            for row in rows
        ]
        parts.append(_latex(f"{dataset}: {READING}.", header, lines, len(rows[0].labels)))
        if compared := compare(rows, columns, summary.against):
            header, lines = _difference_cells(compared, lambda text: f"\0{text}\1")
            parts.append(_latex(f"{dataset}: {chance(compared)}", header, lines, 2))
    return "\n\n".join(parts) + "\n"


def _latex(caption: str, header: list[str], rows: list[list[str]], left: int) -> str:
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in [header, *rows]]
    body = [lines[0], r"\midrule", *lines[1:]]
    columns = "l" * left + "r" * (len(header) - left)
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_escaped(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _escaped(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "−": "$-$", "–": "--", "·": r"$\cdot$", "\0": r"\textbf{", "\1": "}"}
    return "".join(special.get(character, character) for character in text)


def _markdown_two_by_two(tables: list[TwoByTwo]) -> str:
    header = [*tables[0].labels, "classifier", *(f"{trained}/{tested}" for trained, tested in CONDITIONS)]
    lines = [[*t.labels.values(), t.classifier, *(str(t.cells[c]) for c in CONDITIONS)] for t in tables]
    return "### Pre-trained on / tested on, %\n\n" + _markdown(header, lines, len(tables[0].labels) + 1)


def _markdown(header: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, rule, *rows]
    )
