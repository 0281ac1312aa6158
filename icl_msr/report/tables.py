"""What an evaluation measured beside accuracies and gaps, as tables: for the terminal, and for the report's page."""

from collections.abc import Sequence
from typing import Any, Protocol

from rich.table import Table

SHOWN = 20
"""Classes in a table, the best and the worst where there are more."""


class Measured(Protocol):
    """`suite.Results`, or what was read back from results.json."""

    corruptions: list[Any]
    shape: list[Any]
    decodability: list[Any]
    similarity: list[Any]
    textures: list[Any]
    health: list[Any]
    labelled: list[Any]


def tables(results: Measured) -> list[Table]:
    """One for each kind of measure that was taken."""
    kinds = (
        labelled_table,
        corruption_table,
        shape_table,
        decodability_table,
        texture_table,
        similarity_table,
        health_table,
    )
    return [table for kind in kinds if (table := kind(results)) is not None]


def _table(title: str, *left: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in left:
        table.add_column(column, no_wrap=True)
    return table


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, 1)


def labelled_table(results: Measured) -> Table | None:
    """Which images classifiers were fitted with, where those were only some; None else."""
    rows = [row for row in results.labelled if row["fraction"] < 1]
    if not rows:
        return None
    table = _table("Labels used", "part", "chosen by")
    for column in ("images", "classes", "images of\na class"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for row in rows:
        each = str(row["most"]) if row["fewest"] == row["most"] else f"{row['fewest']} to {row['most']}"
        name = f"{100 * row['fraction']:g} %"
        table.add_row(name, row["chosen_by"], str(row["n"]), str(row["classes"]), each, row["note"])
    return table


def corruption_table(results: Measured) -> Table | None:
    """Accuracy under each corruption, by severity and in the mean over severities; None where that was not measured."""
    if not results.corruptions:
        return None
    table = _table("Accuracy under corruptions, %", "corruption", "classifier", "encoder")
    severities = sorted({row["severity"] for row in results.corruptions if row["severity"] is not None})
    for column in (*map(str, severities), "mean"):
        table.add_column(column, justify="right")
    cells: dict[tuple[str, str, str], dict[int | None, str]] = {}
    for row in results.corruptions:
        key = (row["corruption"], row["classifier"], row["encoder"])
        cells.setdefault(key, {})[row["severity"]] = _percent(row["top1"])
    names = list(dict.fromkeys(corruption for corruption, _, _ in cells))
    for key in sorted(cells, key=lambda key: (names.index(key[0]), not key[1].startswith("linear"), key[1])):
        shown = [cells[key].get(severity, "") for severity in (*severities, None)]
        table.add_row(*key, *shown, style="dim" * (key[2] == "untrained"))
    return table


def shape_table(results: Measured) -> Table | None:
    """Shape bias; None where that was not measured."""
    if not results.shape:
        return None
    table = _table("Shape bias on cue-conflict images, %", "classifier", "encoder")
    for column in ("images", "classes", "shape bias", "95 % interval", "taken for\nshape", "taken for\ntexture"):
        table.add_column(column, justify="right")
    for row in results.shape:
        known = (str(row["n"]), str(len(row["classes"])))
        bounds = "–" if row["low"] is None else f"{_percent(row['low'])} to {_percent(row['high'])}"
        cells = (*known, _percent(row["shape_bias"]), bounds, _percent(row["shape"]), _percent(row["texture"]))
        table.add_row(row["classifier"], row["encoder"], *cells, style="dim" * (row["encoder"] == "untrained"))
    return table


def decodability_table(results: Measured) -> Table | None:
    """What linear probes read of shape and texture inside the stimuli; None where that was not measured."""
    if not results.decodability:
        return None
    chance = _percent(results.decodability[0]["chance"])
    table = _table(f"Read from the features of the stimuli, % (chance {chance})", "cue", "encoder")
    for column in ("accuracy", "95 % interval", "n"):
        table.add_column(column, justify="right")
    for row in results.decodability:
        cells = (_percent(row["accuracy"]), f"{_percent(row['low'])} to {_percent(row['high'])}", str(row["n"]))
        table.add_row(row["cue"], row["encoder"], *cells, style="dim" * (row["encoder"] == "untrained"))
    return table


def similarity_table(results: Measured) -> Table | None:
    """How alike two encoders are; None where that was not measured."""
    if not results.similarity:
        return None
    table = _table("Alike", "encoder", "and", "images of")
    for column in ("n", "CKA", "shared\nneighbours, %", "chance, %"):
        table.add_column(column, justify="right")
    for row in results.similarity:
        cells = (str(row["n"]), _number(row["cka"], 3), _percent(row["shared_neighbours"]), _percent(row["chance"]))
        style = "dim" * (row["encoder"] == "untrained")
        table.add_row(row["encoder"], row["other"], row["split"], *cells, style=style)
    return table


def texture_table(results: Measured) -> Table | None:
    """Accuracy on non-semantic versions of the test images, and the classes told best; None where not measured."""
    if not results.textures:
        return None
    chances = {row["level"]: row["chance"] for row in results.textures}
    table = _table("Told from what is left of an image without its content, %", "images", "classifier", "encoder")
    for level, chance in chances.items():
        table.add_column(f"{level}\n(chance {_percent(chance)})", justify="right")
    table.add_column("told best")
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in results.textures:
        rows.setdefault((row["images"], row["classifier"], row["encoder"]), {})[row["level"]] = row
    names = list(dict.fromkeys(images for images, _, _ in rows))
    for key in sorted(rows, key=lambda key: (names.index(key[0]), not key[1].startswith("linear"), key[1])):
        told = {name: value for name, value in rows[key]["fine"]["by_class"].items() if value}
        best = ", ".join(f"{name} {100 * told[name]:.0f}" for name in sorted(told, key=lambda name: -told[name])[:3])
        cells = [_percent(rows[key][level]["top1"]) for level in chances]
        table.add_row(*key, *cells, best, style="dim" * (key[2] == "untrained"))
    return table


def health_table(results: Measured) -> Table | None:
    """How well each encoder uses its space; None where that was not measured."""
    if not results.health:
        return None
    table = _table("Representation", "encoder", "images of")
    for column in ("n", "channels", "effective\nrank", "std\n(1 spread)", "uniformity", "alignment"):
        table.add_column(column, justify="right")
    for row in results.health:
        cells = (str(row["n"]), str(row["channels"]), _number(row["effective_rank"], 1))
        table.add_row(
            row["encoder"], row["split"], *cells, _number(row["feature_std"], 2), _number(row["spread"], 2),
            _number(row.get("alignment"), 2),
            style="dim" * (row["encoder"] == "untrained"),
        )  # fmt: skip
    return table


def class_tables(per_class: Sequence[Any], classes: Sequence[str]) -> list[Table]:
    """Accuracy by class and the largest confusions on the first test split.

    Of the trained encoder and the linear probe, or the first classifier where there is none, fitted on train.
    """
    rows = [row for row in per_class if (row["encoder"], row["fitted_on"]) == ("trained", "train")]
    if not rows:
        return []
    row = next((row for row in rows if row["classifier"].startswith("linear")), rows[0])
    where = f"{row['split']}, {row['classifier']}"
    known = [
        (accuracy, name) for accuracy, name in zip(row["accuracies"], classes, strict=False) if accuracy is not None
    ]
    ranked = sorted(known, key=lambda pair: -pair[0])
    if len(ranked) > SHOWN:
        ranked = ranked[: SHOWN // 2] + ranked[-SHOWN // 2 :]
        where += f": the best and the worst {SHOWN // 2} of {len(known)}"
    taken: dict[str, str] = {}
    for true, predicted, images in row["confused"]:
        taken.setdefault(true, f"{predicted} ({images})")
    by_class = _table(f"Classes ({where})", "class")
    for column in ("accuracy, %", "most often taken for"):
        by_class.add_column(column, justify="right")
    for accuracy, name in ranked:
        by_class.add_row(name, _percent(accuracy), taken.get(name, ""))
    confusions = _table(f"Largest confusions ({row['split']}, {row['classifier']})", "class", "taken for")
    confusions.add_column("images", justify="right")
    for true, predicted, images in row["confused"]:
        confusions.add_row(true, predicted, str(images))
    return [by_class, confusions]


def top_five_table(accuracies: Sequence[Any]) -> Table | None:
    """Top-5 beside top-1, where there are more than five classes."""
    rows = [row for row in accuracies if row.top5 is not None]
    if not rows:
        return None
    table = _table("Top-5 accuracy, %", "split", "classifier", "fitted on", "encoder")
    for column in ("top-1", "top-5"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (_percent(row.top1), _percent(row.top5))
        style = "dim" * (row.encoder == "untrained")
        table.add_row(row.split, row.classifier, row.fitted_on, row.encoder, *cells, style=style)
    return table
