"""The background matrix in the terminal, and its answer in words."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from icl_msr.evaluation.suite import Gap, Results

_RELIANCE = {
    "bg_gap": ("a background of the right class", "a random background"),
    "original_minus_mixed_rand": ("the original background", "a random background"),
    "full_minus_fg": ("the whole image", "the foreground alone"),
}
"""Gaps that answer "how far does it rely on the background?", the best first, and what they compare."""

_HEADINGS = {
    "bg_gap": "BG gap\n(same - rand)",
    "original_minus_mixed_rand": "original\n- rand",
    "original_minus_only_fg": "original\n- only fg",
    "only_bg_above_chance": "only bg\n- chance",
    "full_minus_fg": "full - fg",
}


def background_table(results: Results, title: str = "Background matrix") -> Group:
    """A table of every accuracy (%) and gap (points, with half the width of its 95 % interval), and the answer."""
    splits = list(dict.fromkeys(record["split"] for record in results.accuracies))
    gaps = list(dict.fromkeys(record["gap"] for record in results.gaps))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for accuracy in results.accuracies:
        row = cells.setdefault((accuracy["encoder"], accuracy["classifier"], accuracy["fitted_on"]), {})
        row[accuracy["split"]] = f"{100 * accuracy['top1']:.1f}"
    for gap in results.gaps:
        row = cells[gap["encoder"], gap["classifier"], gap["fitted_on"]]
        row[gap["gap"]] = f"{gap['points']:.1f} ±{(gap['high'] - gap['low']) / 2:.1f}"

    caption = "Top-1 accuracy in %, gaps in percentage points with their 95 % interval over images"
    table = Table(title=title, caption=caption, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("encoder", "classifier", "fitted on"):
        table.add_column(heading.replace(" ", "\n"), no_wrap=True)
    for split in splits:
        table.add_column(split.replace("_", "\n"), justify="right", no_wrap=True)
    for name in gaps:
        table.add_column(_HEADINGS[name], justify="right", no_wrap=True, style="cyan")
    previous = None
    for key, row in cells.items():
        if previous not in (None, key[0]):
            table.add_section()
        previous = key[0]
        table.add_row(*key, *(row.get(column, "") for column in [*splits, *gaps]))
    notes = [
        Text(f"{choice['encoder']}, fitted on {choice['fitted_on']}: {choice['note']}", style="yellow")
        for choice in results.choices
        if choice["note"]
    ]
    return Group(table, Text(answer(results)), *notes)


def answer(results: Results) -> str:
    """One paragraph: by how many points the trained encoder relies on the background, and how sure that is."""
    name = next((gap for gap in _RELIANCE if any(record["gap"] == gap for record in results.gaps)), None)
    if name is None:
        return "The data set has no splits that tell the object from the background."
    gaps = [record for record in results.gaps if record["gap"] == name]
    classifiers = [record["classifier"] for record in gaps]
    classifier = "linear" if "linear" in classifiers else classifiers[0]
    found = {(gap["encoder"], gap["fitted_on"]): gap for gap in gaps if gap["classifier"] == classifier}

    trained = found["trained", "train"]
    verb = "relies on the background by" if trained["low"] > 0 else "does not measurably rely on the background:"
    judge = "a linear probe" if classifier == "linear" else f"kNN ({classifier.removeprefix('knn-')})"
    better, worse = _RELIANCE[name]
    text = f"Judged by {judge} fitted on train, the encoder {verb} {_points(trained)}, the accuracy "
    text += f"with {better} minus that with {worse}."
    if ("trained", "balanced") in found:
        text += f" Fitted on the balanced split it is {_points(found['trained', 'balanced'])}."
    if ("untrained", "train") in found:
        text += f" For the untrained encoder, fitted on train, it is {_points(found['untrained', 'train'])}."
    return text


def _points(gap: Gap) -> str:
    return f"{gap['points']:.1f} points (95 % interval {gap['low']:.1f} to {gap['high']:.1f})"
