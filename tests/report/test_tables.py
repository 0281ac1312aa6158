import base64
import csv
import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.written import LINEAR, classifier

from icl_msr.core.records import ByClass, Chart, Layout, Measurement, Outcome, Records
from icl_msr.core.tables import Table
from icl_msr.evaluation.labels import LABELS
from icl_msr.evaluation.shape import DECODABILITY, SHAPE
from icl_msr.evaluation.shift import CORRUPTION
from icl_msr.evaluation.similarity import SIMILARITY
from icl_msr.evaluation.texture_only import TEXTURE
from icl_msr.report.tables import charts, class_tables, tables


def measure(layout: Layout, **known: Any) -> Any:
    """Makes records of a layout."""
    return partial(Measurement, **{"kind": layout.kind, "classifier": LINEAR, "fitted_on": "train", "n": 20, **known})


def printed(*found: tuple[Layout, list[Measurement]], width: int = 120) -> str:
    records = Records()
    for layout, rows in found:
        records.add(layout, *rows)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables(Outcome(seed=0, records=records)):
        console.print(table.rich())
    return console.export_text()


def test_nothing_measured_nothing_shown() -> None:
    assert tables(Outcome(seed=0)) == []
    assert tables(Outcome(seed=0, records=Records(layouts={"shape": SHAPE}))) == []


def test_numbers_are_those_of_the_rows() -> None:
    top1 = measure(CORRUPTION, low=0.1, high=0.3)
    corruptions = [
        top1(value=value, factors={"corruption": name, "severity": severity})
        for name, severity, value in (
            ("fog", 1, 0.5),
            ("fog", 5, 0.25),
            ("fog", "mean", 0.375),
            ("mean", "mean", 0.375),
        )
    ]
    shape = []
    for encoder, decided, value, low, high, shares in (
        ("trained", 8, 0.625, 0.1, 0.3, (0.25, 0.15)),
        ("untrained", 0, None, None, None, (0.0, 0.0)),
    ):
        one = measure(SHAPE, encoder=encoder)
        shape += [one(metric="classes", value=2, unit="count"), one(metric="decided", value=decided, unit="count")]
        shape += [one(metric="shape_bias", value=value, low=low, high=high)]
        shape += [one(metric=cue, value=share) for cue, share in zip(("shape", "texture"), shares, strict=True)]
    read = measure(DECODABILITY, classifier=None, n=36)
    decodability = [
        record
        for cue, value in (("shape", 0.75), ("texture", 0.5))
        for record in (
            read(value=value, low=0.5, high=0.9, factors={"cue": cue}),
            read(metric="chance", value=0.25, factors={"cue": cue}),
        )
    ]
    text = printed((CORRUPTION, corruptions), (SHAPE, shape), (DECODABILITY, decodability))
    cells = [line.split() for line in text.splitlines()]
    assert ["fog", "linear", "trained", "50.0", "±10.0", "25.0", "±10.0", "37.5", "±10.0"] in cells
    assert ["mean", "linear", "trained", "–", "–", "37.5", "±10.0"] in cells
    assert ["linear", "trained", "20", "2", "8", "62.5", "±10.0", "25.0", "15.0"] in cells
    assert ["linear", "untrained", "20", "2", "0", "–", "0.0", "0.0"] in cells
    assert ["texture", "trained", "36", "50.0", "±20.0", "25.0"] in cells


BEST = "brick 100, zebra 90, grass 50"


def test_the_classes_that_are_told_best_from_textures() -> None:
    textures = [
        record
        for images in ("test", "only_patch")
        for level, value, chance, note in (
            ("fine", 0.25, 0.2, BEST),
            ("coarse", 0.5, 0.36, ""),
        )
        for one in [measure(TEXTURE, factors={"images": images, "level": level})]
        for record in (one(value=value, note=note), one(metric="chance", value=chance))
    ]
    text = " ".join(printed((TEXTURE, textures)).split())
    assert f"only_patch linear trained 25.0 20.0 50.0 36.0 {BEST}" in text


def test_the_labels_that_were_used() -> None:
    rows = []
    for part, fewest, note in (("5%", 5, ""), ("10%", 1, "unlike")):
        one = measure(LABELS, classifier=None, unit="count", factors={"part": part, "chosen_by": "seed 3"})
        found = {"images": 20, "classes": 4, "fewest": fewest, "most": 5}
        rows += [one(metric=name, value=n, note=note * (name == "images")) for name, n in found.items()]
    cells = [line.split() for line in printed((LABELS, rows)).splitlines()]
    assert ["5%", "seed", "3", "20", "4", "5", "5"] in cells
    assert ["10%", "seed", "3", "20", "4", "1", "5", "unlike"] in cells


def test_the_best_and_the_worst_classes_and_what_they_are_taken_for() -> None:
    classes = [f"c{k}" for k in range(30)]
    accuracies = [k / 30 for k in range(29)] + [None]
    known: Any = {"encoder": "trained", "fitted_on": "train", "split": "test"}
    row = ByClass(**known, classifier=LINEAR, accuracies=accuracies, confused=[["c0", "c7", 9], ["c0", "c8", 4]])
    other = ByClass(**known, classifier=classifier("knn-dino"), accuracies=[1.0] * 30)
    by_class, confusions = class_tables([other, row], classes)
    columns = list(zip(*([cell.text for cell in line.cells] for line in by_class.lines), strict=True))
    assert list(columns[0]) == [f"c{k}" for k in (*range(28, 18, -1), *range(9, -1, -1))]
    assert columns[1][0] == "93.3"
    assert list(columns[2])[-2:] == ["", "c7 (9)"]
    assert "best and the worst 10 of 29" in by_class.title
    assert confusions.data == [["c0", "c7", 9], ["c0", "c8", 4]]
    assert class_tables([ByClass(**{**known, "encoder": "untrained"}, classifier=LINEAR, accuracies=[])], classes) == []


def test_likeness() -> None:
    one = measure(SIMILARITY, classifier=None, split="test", n=50, factors={"other": "timm:vit"})
    rows = [one(metric="cka", value=0.5, unit="number"), one(metric="shared_neighbours", value=0.25)]
    lines = printed((SIMILARITY, [*rows, one(metric="chance", value=0.1)])).splitlines()
    assert ["trained", "timm:vit", "test", "50", "0.500", "25.0", "10.0"] in [line.split() for line in lines]


def test_one_table_in_every_dress() -> None:
    rows = [{"a": "x|y & <z>", "b": 0.5}, {"b": -1.5, "c": None}]
    table = Table.of("it", rows)
    assert table.csv() == "a,b,c\nx|y & <z>,0.5,\n,-1.5,\n"
    assert table.heads == ["a", "b", "c"]
    assert table.data == [["x|y & <z>", 0.5, None], [None, -1.5, None]]
    assert "| x\\|y & <z> | 0.5 |" in table.markdown()
    assert r"x|y \& <z> & 0.5 & " in table.latex("cap_tion")
    assert r"cap\_tion" in table.latex("cap_tion")
    assert "x|y &amp; &lt;z&gt;" in table.html()
    assert "<z>" not in table.html()


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r"])
def test_no_spreadsheet_runs_a_cell(sign: str) -> None:
    formula = f"{sign}1+1"
    table = Table.of("it", [{formula: formula, "b": -1.5}])
    head, row = csv.reader(io.StringIO(table.csv(), newline=""))
    cell = f"'{formula}".replace("\r", " ")
    assert (head, row) == ([cell, "b"], [cell, "-1.5"])


def test_all_csv_files_have_one_writer() -> None:
    """Except the rows of `metrics.csv`, which are numbers."""
    root = Path(__file__).parents[2]
    files = [file for room in ("icl_msr", "experiments") for file in (root / room).rglob("*.py")]
    writers = {
        str(file.relative_to(root)) for file in files if re.search("csv.(Dict)?[wW]riter|to_csv", file.read_text())
    }
    assert writers == {"icl_msr/core/tables.py", "icl_msr/training/loggers/metrics_file.py"}


def test_lines_over_an_axis_of_numbers_and_names_that_mean_something_to_matplotlib() -> None:
    chart = Chart(axis="dose", series=("drug",), shape="lines")
    layout = Layout(kind="toy", title="Effect", rows=("drug",), columns=("dose",), chart=chart)
    records = [
        Measurement(kind="toy", value=dose / 10, factors={"drug": drug, "dose": dose})
        for drug in ("$x^2_$", "_hidden")
        for dose in (1, 2, 3)
    ]
    (plot,) = charts(layout, records)
    drawn = base64.b64decode(plot.light.split(",")[1]).decode()
    assert plot.title == "Effect"
    assert {"dose", "$x^2_$", "_hidden"} <= {text.strip("\u200b") for text in re.findall(r">([^<>\n]+)</text>", drawn)}
