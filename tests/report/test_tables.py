from rich.console import Console

from icl_msr.evaluation.suite import Results
from icl_msr.report.tables import class_tables, tables

ROW = {"encoder": "trained", "classifier": "linear", "fitted_on": "train", "low": 0.1, "high": 0.3, "n": 20}


def printed(results: Results) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables(results):
        console.print(table)
    return console.export_text()


def test_nothing_measured_nothing_shown() -> None:
    assert tables(Results()) == []


def test_numbers_are_those_of_the_rows() -> None:
    corruptions = [
        {**ROW, "split": "test", "corruption": name, "severity": severity, "top1": top1}
        for name, severity, top1 in (("fog", 1, 0.5), ("fog", 5, 0.25), ("fog", None, 0.375), ("mean", None, 0.375))
    ]
    shape = [
        {**ROW, "classes": ["cat", "dog"], "decided": 8, "shape_bias": 0.625, "shape": 0.25, "texture": 0.15},
        {**ROW, "encoder": "untrained", "classes": ["cat", "dog"], "decided": 0, "shape_bias": None, "low": None,
         "high": None, "shape": 0.0, "texture": 0.0},
    ]  # fmt: skip
    decodability = [
        {"encoder": "trained", "cue": cue, "classes": 4, "n": 36, "folds": 3, "accuracy": accuracy, "low": 0.5,
         "high": 0.9, "chance": 0.25}
        for cue, accuracy in (("shape", 0.75), ("texture", 0.5))
    ]  # fmt: skip
    lines = printed(Results(corruptions=corruptions, shape=shape, decodability=decodability)).splitlines()
    cells = [line.split() for line in lines]
    assert ["fog", "linear", "trained", "50.0", "25.0", "37.5"] in cells
    assert ["mean", "linear", "trained", "37.5"] in cells
    assert ["linear", "trained", "20", "2", "62.5", "10.0", "to", "30.0", "25.0", "15.0"] in cells
    assert ["linear", "untrained", "20", "2", "–", "–", "0.0", "0.0"] in cells
    assert ["texture", "trained", "50.0", "50.0", "to", "90.0", "36"] in cells
    assert any("chance 25.0" in line for line in lines)


def test_the_classes_that_are_told_best_from_textures() -> None:
    told = {"zebra": 0.9, "cat": 0.1, "brick": 1.0, "dog": None, "grass": 0.5}
    textures = [
        {**ROW, "split": "test", "images": images, "level": level, "top1": top1, "chance": chance, "by_class": told}
        for images in ("test", "only_patch")
        for level, top1, chance in (("fine", 0.25, 0.2), ("coarse", 0.5, 0.36))
    ]
    text = " ".join(printed(Results(textures=textures)).split())
    assert "(chance 20.0) (chance 36.0)" in text
    assert "only_patch linear trained 25.0 50.0 brick 100, zebra 90, grass 50" in text


def test_the_labels_that_were_used() -> None:
    row = {"n": 20, "classes": 4, "fewest": 5, "most": 5, "chosen_by": "seed 3", "file": "a", "note": ""}
    rows = [{**row, "fraction": 0.05}, {**row, "fraction": 0.1, "fewest": 1, "note": "unlike"}, {**row, "fraction": 1}]
    cells = [line.split() for line in printed(Results(labelled=rows)).splitlines()]
    assert ["5", "%", "seed", "3", "20", "4", "5"] in cells
    assert ["10", "%", "seed", "3", "20", "4", "1", "to", "5", "unlike"] in cells
    assert not any(line[:1] == ["100"] for line in cells)
    assert tables(Results(labelled=rows[2:])) == []


def test_the_best_and_the_worst_classes_and_what_they_are_taken_for() -> None:
    classes = [f"c{k}" for k in range(30)]
    row = {"encoder": "trained", "classifier": "linear", "fitted_on": "train", "split": "test"}
    row |= {"accuracies": [k / 30 for k in range(29)] + [None], "confused": [("c0", "c7", 9), ("c0", "c8", 4)]}
    other = {**row, "classifier": "knn-dino", "accuracies": [1.0] * 30}
    by_class, confusions = class_tables([other, row], classes)
    names = list(by_class.columns[0].cells)
    assert names == [f"c{k}" for k in (*range(28, 18, -1), *range(9, -1, -1))]
    assert next(iter(by_class.columns[1].cells)) == "93.3"
    assert list(by_class.columns[2].cells)[-2:] == ["", "c7 (9)"]
    assert "best and the worst 10 of 29" in str(by_class.title)
    assert [list(column.cells) for column in confusions.columns] == [["c0", "c0"], ["c7", "c8"], ["9", "4"]]
    assert class_tables([{**row, "encoder": "untrained"}], classes) == []


def test_likeness() -> None:
    row = {"encoder": "trained", "other": "timm:vit", "split": "test", "n": 50, "cka": 0.5, "shared_neighbours": 0.25}
    lines = printed(Results(similarity=[{**row, "chance": 0.1}])).splitlines()
    assert ["trained", "timm:vit", "test", "50", "0.500", "25.0", "10.0"] in [line.split() for line in lines]
