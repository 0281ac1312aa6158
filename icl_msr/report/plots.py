"""Plots as SVG, each drawn for a light and a dark page."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icl_msr.report.runs import Curve


@dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme; `series` is told apart by colour-blind readers (after Okabe and Ito, 2008)."""

    card: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1d2125", "#6b7177", "#e3e4e1", ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#a87900", "#555b61")
)
DARK = Theme(
    "#1b1e22", "#e6e8ea", "#9aa1a8", "#353a40", ("#5ab4f0", "#ff8c42", "#35c79a", "#e28fc4", "#e6b93c", "#b4bac0")
)


@dataclass(frozen=True)
class Plot:
    """One plot as two data URIs, with the words for those who do not see it."""

    light: str
    dark: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """One point of a dot plot: a value with an interval, and single observations around it."""

    value: float
    low: float | None = None
    high: float | None = None
    single: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """Dots of one colour and marker, one a row; a row without a dot stays empty."""

    name: str
    dots: Sequence[Dot | None]
    colour: int
    filled: bool = True
    marker: str = "o"


def dots(
    title: str, rows: Sequence[str], series: Sequence[Series], unit: str, reference: float | None = None, note: str = ""
) -> Plot:
    """Horizontal dot plot: one row a label, the first at the top; `reference` is a dashed vertical line."""

    def draw(axes: Axes, theme: Theme) -> None:
        for s, entry in enumerate(series):
            colour = theme.series[entry.colour] if entry.colour >= 0 else theme.muted
            shift = (s - (len(series) - 1) / 2) * 0.62 / max(len(series), 1)
            face = colour if entry.filled else theme.card
            label: str | None = entry.name
            for row, dot in enumerate(entry.dots):
                if dot is None:
                    continue
                y = row + shift
                if dot.low is not None and dot.high is not None:
                    axes.plot([dot.low, dot.high], [y, y], color=colour, lw=1.6, solid_capstyle="butt", zorder=2)
                axes.plot(dot.single, [y] * len(dot.single), "|", color=colour, ms=6, mew=1, zorder=2)
                axes.plot(
                    [dot.value], [y], entry.marker, color=colour, mfc=face, mew=1.4, ms=5.5, zorder=3, label=label
                )
                label = None
        if reference is not None:
            axes.axvline(reference, color=theme.muted, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        if len(series) > 1:
            _legend(axes, columns=2)

    lines = max(len(rows), 2)
    return _plot(draw, title, note, height=1.15 + lines * (0.2 + 0.1 * len(series)))


def lines(title: str, curves: dict[str, Curve], log: bool = False, note: str = "", zero: bool = False) -> Plot:
    """Curves over the optimiser's steps."""

    def draw(axes: Axes, theme: Theme) -> None:
        for i, (name, curve) in enumerate(curves.items()):
            steps, values = _thin(curve)
            marker = "o" if len(steps) <= 30 else ""
            axes.plot(steps, values, marker=marker, ms=2.5, lw=1.5, color=theme.series[i % 6], label=name)
        if log:
            axes.set_yscale("log")
        elif zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.grid(axis="y")
        if len(curves) > 1:
            _legend(axes, columns=2)

    return _plot(draw, title, note, height=2.65)


def _thin(curve: Curve, points: int = 400) -> tuple[list[float], list[float]]:
    """Means of runs of neighbours, so that a long training does not make a page of megabytes."""
    size = -(-len(curve.steps) // points)
    starts = range(0, len(curve.steps), size or 1)
    chunks = [(curve.steps[i : i + size], curve.values[i : i + size]) for i in starts]
    return [sum(s) / len(s) for s, _ in chunks], [sum(v) / len(v) for _, v in chunks]


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _plot(draw: Callable[[Axes, Theme], None], title: str, note: str, height: float) -> Plot:
    return Plot(*(_svg(draw, theme, height) for theme in (LIGHT, DARK)), title=title, note=note)


def _svg(draw: Callable[[Axes, Theme], None], theme: Theme, height: float) -> str:
    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "icl-msr",
        "font.sans-serif": ["Segoe UI", "Helvetica Neue", "Roboto", "Liberation Sans", "DejaVu Sans"],
        "font.size": 9,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.rule,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "figure.facecolor": theme.card,
        "axes.facecolor": theme.card,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "ytick.labelcolor": theme.ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "grid.color": theme.rule,
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.2,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.6, height), layout="constrained")
        draw(figure.add_subplot(), theme)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue().encode()).decode()
