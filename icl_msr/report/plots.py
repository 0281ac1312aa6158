"""SVG plots, each in a light and a dark version."""

import base64
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icl_msr.core.figures import plain
from icl_msr.report.runs import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Plots are drawn in the colours of the light page. For the dark page, each colour is replaced in the SVG.
CARD, INK, MUTED, RULE = "#ffffff", "#1d2125", "#6b7177", "#e3e4e1"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5589a", "#a87900", "#555b61")
"""Colours that colour-blind readers can distinguish (after Okabe and Ito, 2008)."""
DARK = {CARD: "#1b1e22", INK: "#e6e8ea", MUTED: "#9aa1a8", RULE: "#353a40"} | dict(
    zip(SERIES, ("#5ab4f0", "#ff8c42", "#35c79a", "#e28fc4", "#e6b93c", "#b4bac0"), strict=True)
)
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "icl-msr",
    "font.sans-serif": ["Segoe UI", "Helvetica Neue", "Roboto", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": CARD,
    "axes.facecolor": CARD,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
}


@dataclass(frozen=True)
class Plot:
    """A plot as two data URIs, with a title that also serves as alternative text."""

    light: str
    dark: str
    title: str
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """A point of a dot plot: a value with an interval, and the single observations."""

    value: float
    low: float | None = None
    high: float | None = None
    single: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """Dots of one colour and marker, one for each row. `colour` None is grey, and a dot None leaves the row empty."""

    name: str
    dots: Sequence[Dot | None]
    colour: int | None
    filled: bool = True
    marker: str = "o"


def dots(
    title: str, rows: Sequence[str], series: Sequence[Series], unit: str, reference: float | None = None, note: str = ""
) -> Plot:
    """Draw a horizontal dot plot, with the first row at the top. `reference` is a dashed vertical line."""
    labels = ["\n".join(textwrap.wrap(plain(row), 26)) for row in rows]

    def draw(axes: "Axes") -> None:
        for s, entry in enumerate(series):
            colour = MUTED if entry.colour is None else SERIES[entry.colour]
            shift = (s - (len(series) - 1) / 2) * 0.62 / max(len(series), 1)
            face = colour if entry.filled else CARD
            label: str | None = plain(entry.name)
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
            axes.axvline(reference, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        if len(series) > 1:
            _legend(axes, columns=2)

    tallest = max(label.count("\n") + 1 for label in labels)
    row_height = max(0.2 + 0.1 * len(series), 0.1 + 0.16 * tallest)
    return _plot(draw, title, note, 4.2, 1.0 + max(len(rows), 2) * row_height)


def lines(
    title: str, curves: dict[str, Curve], log: bool = False, note: str = "", zero: bool = False, axis: str = "step"
) -> Plot:
    """Draw curves over the optimiser's steps, or over another `axis`."""

    def draw(axes: "Axes") -> None:
        for i, (name, curve) in enumerate(curves.items()):
            steps, values = _thin(curve)
            marker = "o" if len(steps) <= 30 else ""
            axes.plot(steps, values, marker=marker, ms=2.5, lw=1.5, color=SERIES[i % 6], label=plain(_short(name)))
        if log:
            axes.set_yscale("log")
        elif zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(axis)
        axes.grid(axis="y")
        if len(curves) > 1:
            _legend(axes, columns=3)

    return _plot(draw, title, note, 3.3, 2.2)


def race(title: str, curves: dict[str, Curve], unit: str, note: str = "") -> Plot:
    """Draw many curves over the optimiser's steps, with a legend in the order of their last values."""
    order = sorted(curves, key=lambda name: -curves[name].values[-1])

    def draw(axes: "Axes") -> None:
        for i, name in enumerate(order):
            style = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))[i // len(SERIES) % 4]
            axes.plot(*_thin(curves[name]), lw=1.4, ls=style, color=SERIES[i % len(SERIES)], label=plain(name))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.02), borderaxespad=0.2, handlelength=2.4)

    return _plot(draw, title, note, 6.8, max(2.6, 0.6 + 0.18 * len(order)))


def _short(name: str) -> str:
    """Return the short name of a curve, such as `meta` for `msr/meta_grad_norm`. The plot's title says the rest."""
    return name.rsplit("/")[-1].removesuffix("_grad_norm").removeprefix("similarity_")


def _thin(curve: Curve, points: int = 400) -> tuple[list[float], list[float]]:
    """Return means of neighbouring points, so that a long training does not make a huge page."""
    size = -(-len(curve.steps) // points)
    starts = range(0, len(curve.steps), size or 1)
    chunks = [(curve.steps[i : i + size], curve.values[i : i + size]) for i in starts]
    return [sum(s) / len(s) for s, _ in chunks], [sum(v) / len(v) for _, v in chunks]


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def _plot(draw: "Callable[[Axes], None]", title: str, note: str, width: float, height: float) -> Plot:
    """Return a plot of `width` x `height` inches. Text is 9 pt if the page shows the plot at that width."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    light = content.getvalue()
    dark = re.sub("|".join(DARK), lambda colour: DARK[colour[0]], light)
    return Plot(_uri(light), _uri(dark), title, note)


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
