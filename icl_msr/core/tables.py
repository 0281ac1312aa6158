"""Tables as data, and their HTML, Markdown, LaTeX, CSV and terminal forms."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOTHING = "–"
"""The text of a cell without a value."""


@dataclass(frozen=True)
class Column:
    """The heading of a column."""

    head: str
    detail: str = ""
    """Small text below the heading."""
    hint: str = ""
    """Small text below the heading of a column without `detail`, on HTML pages only."""
    words: bool = False
    """True if the cells are words, aligned left. Numbers are aligned right."""
    prose: bool = False
    """True if the cells are long texts that may wrap."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str = NOTHING
    value: Any = None
    """The value for programs: the number before rounding."""
    detail: str = ""
    """Small text below the cell's text, such as an interval."""
    margin: str = ""
    """Text after the cell's text, in formats without small text below it."""
    strong: bool = False
    heat: float | None = None
    """Strength of the cell's colour, in [0, 1]."""
    link: str = ""

    @property
    def line(self) -> str:
        """The text with its margin."""
        return f"{self.text} {self.margin}".rstrip()


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    cells: Sequence[Cell]
    faint: bool = False
    """True if the line is shown only for comparison."""


@dataclass(frozen=True)
class Table:
    """A table with a title, columns and lines."""

    name: str
    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    note: str = ""
    about: str = ""
    folded: bool = False

    @classmethod
    def of(cls, name: str, rows: Iterable[Mapping[str, Any]]) -> "Table":
        """Return a table of flat rows. A row may lack a column."""
        rows = list(rows)
        heads = list(dict.fromkeys(head for row in rows for head in row))
        lines = [Line([Cell(str(row.get(head, "")), row.get(head)) for head in heads]) for row in rows]
        return cls(name, name, [Column(head) for head in heads], lines)

    @property
    def data(self) -> list[list[Any]]:
        """The values of the cells, line by line."""
        return [[cell.value for cell in line.cells] for line in self.lines]

    @property
    def heads(self) -> list[str]:
        """The headings of the columns, with their details."""
        return [f"{column.head} ({column.detail})" if column.detail else column.head for column in self.columns]

    def rich(self, *, roomy: bool = False) -> "RichTable":
        """Return the table for a terminal. `roomy` puts two spaces between columns instead of one."""
        from rich.table import Table as RichTable
        from rich.text import Text

        title = Text(f"\n{self.title}" if self.title else "", "italic")
        table = RichTable(title=title, title_justify="left", box=None, padding=(0, 2 if roomy else 1, 0, 0))
        for column in self.columns:
            words = column.head.replace("_", "\n").splitlines()
            head = Text("\n".join(words if column.words else (line for word in words for line in wrap(word, 12))))
            if column.detail:
                head += Text("\n" + column.detail.replace(", ", "\n"), "dim not bold")
            fixed = not (roomy or column.prose)
            table.add_column(head, justify="left" if column.words else "right", overflow="fold", no_wrap=fixed)
        for line in self.lines:
            cells = [Text(cell.line, "bold" if cell.strong else "") for cell in line.cells]
            table.add_row(*cells, style="dim" if line.faint else None)
        return table

    def html(self) -> str:
        """Return the table as HTML. Its CSS class is `name`."""
        kinds = [' class="text"' if column.words else "" for column in self.columns]
        heads = [
            f"<th{kind}>{escape(column.head)}{_small(column.detail or column.hint)}</th>"
            for kind, column in zip(kinds, self.columns, strict=True)
        ]
        lines, before = [], ""
        for line in self.lines:
            again, before = line.cells[0].text == before and not line.cells[0].link, line.cells[0].text
            cells = [_html(cell, column) for cell, column in zip(line.cells, self.columns, strict=True)]
            if again:
                cells[0] = f'<td class="text again">{escape(before)}</td>'
            lines.append(('<tr class="faint">' if line.faint else "<tr>") + "".join(cells) + "</tr>")
        body = "\n".join(lines)
        return (
            f'<div class="box"><table class="{escape(self.name)}">\n<thead><tr>{"".join(heads)}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )

    def markdown(self) -> str:
        """Return the table as Markdown, with its title and its note."""
        rule = ["---" if column.words else "---:" for column in self.columns]
        body = [[f"**{c.line}**" if c.strong else c.line for c in line.cells] for line in self.lines]
        escaped = ([text.replace("|", "\\|") for text in row] for row in [self.heads, rule, *body])
        lines = [f"| {' | '.join(row)} |" for row in escaped]
        return "\n\n".join(filter(None, (f"### {self.title}", "\n".join(lines), self.note)))

    def latex(self, caption: str) -> str:
        """Return the table as a LaTeX environment that needs booktabs."""
        body = [
            [rf"\textbf{{{_latex(cell.line)}}}" if cell.strong else _latex(cell.line) for cell in line.cells]
            for line in self.lines
        ]
        head, *lines = (" & ".join(row) + r" \\" for row in [[_latex(name) for name in self.heads], *body])
        columns = "".join("l" if column.words else "r" for column in self.columns)
        opening = [r"\begin{table}", rf"\caption{{{_latex(caption)}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        return "\n".join([*opening, head, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])

    def csv(self) -> str:
        """Return the values as CSV, with the headings in the first line."""
        return csv_text([self.heads, *self.data])


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows of cells as CSV, with inert texts."""
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([inert(value) for value in row] for row in rows)
    return content.getvalue()


def inert(value: Any) -> Any:
    """Return a cell that no spreadsheet runs: a text that begins like a formula has a quote before it.

    A carriage return becomes a space, because `csv` would not quote it.
    """
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")
    return f"'{text}" if value[:1] in tuple("=+-@\t\r") else text


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _html(cell: Cell, column: Column) -> str:
    classes = [*(["text"] if column.words else []), *(["best"] if cell.strong else [])]
    style = ""
    if cell.heat is not None:
        classes.append("heat")
        style = f' style="--heat: {46 * cell.heat:.1f}%"'
    text = f'<a href="{escape(cell.link)}">{escape(cell.text)}</a>' if cell.link else escape(cell.text)
    kind = f' class="{joined}"' if (joined := " ".join(classes)) else ""
    return f"<td{kind}{style}>{text}{_small(cell.detail)}</td>"


def _latex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "−": "$-$", "–": "--", "·": r"$\cdot$"}
    return "".join(special.get(character, character) for character in text)
