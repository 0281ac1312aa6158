"""Records: what a number is stands in fields, its name is made of them, and what is written is read again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.written import accuracy, gap, outcome, save

from icl_msr.core.errors import UserError
from icl_msr.core.records import ByClass, Chart, Classifier, Layout, Measurement, Outcome, Records

FOG = Measurement(
    kind="corruption",
    value=0.25,
    low=0.2,
    high=0.5,
    n=8,
    classifier=Classifier(family="linear", preset="moco", fraction=0.1),
    fitted_on="train",
    split="clean",
    factors={"corruption": "fog", "severity": 3},
    note="thick",
)
LAYOUT = Layout(
    kind="corruption",
    title="Under corruptions",
    rows=("corruption",),
    columns=("severity",),
    labels={"fog": "mist"},
    chart=Chart(axis="severity", series=("corruption",), where={"metric": "accuracy"}, shape="lines"),
)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (accuracy("mixed_rand", 0.5, fitted_on="balanced"), "linear/balanced/mixed_rand"),
        (accuracy("test", 0.5, "knn-dino"), "knn-dino/train/test"),
        (accuracy("test", 0.5, "linear-0.5%"), "linear-0.5%/train/test"),
        (gap("full", "fg", 3.0), "linear/train/full - fg"),
        (gap("only_bg", "chance", 3.0, encoder="untrained"), "linear/train/only_bg - chance"),
        (FOG, "corruption/linear-moco-10%/train/clean/fog/3"),
        (Measurement(kind="health", metric="alignment", value=1.0, split="test"), "health/alignment/test"),
    ],
)
def test_a_name_as_a_user_types_it(record: Measurement, name: str) -> None:
    assert record.name == name


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (accuracy("mixed_rand", 0.5, fitted_on="balanced"), "linear/balanced/mixed_rand"),
        (accuracy("test", 0.5, "linear-0.5%"), "linear_0_5pct/train/test"),
        (gap("only_bg", "chance", 3.0, "knn-dino"), "knn_dino/train/only_bg_minus_chance_points"),
        (FOG, "corruption/linear_moco_10pct/train/clean/fog/3"),
    ],
)
def test_a_name_on_a_dashboard_is_plain_and_has_its_unit(record: Measurement, name: str) -> None:
    assert record.dashboard_name == name


def test_an_outcome_has_names_to_type_and_names_of_dashboards() -> None:
    found = outcome(gap("full", "fg", 3.0), accuracy("a", 0.1, encoder="untrained"), final={"lr-Adam/pg 1": 0.5})
    found.wall_time_s, found.metric = 2.0, {"name": "x", "value": None}
    assert found.numbers() == {"lr-Adam/pg 1": 0.5, "linear/train/full - fg": 3.0, "wall_time_s": 2.0}
    plain = {"lr_Adam/pg_1": 0.5, "linear/train/full_minus_fg_points": 3.0, "wall_time_s": 2.0}
    assert found.dashboard_numbers() == plain


def test_rows_are_flat_and_read_again() -> None:
    row = FOG.row()
    assert row == {
        "encoder": "trained", "family": "linear", "preset": "moco", "fraction": 0.1, "fitted_on": "train",
        "split": "clean", "corruption": "fog", "severity": 3, "metric": "accuracy", "value": 0.25, "low": 0.2,
        "high": 0.5, "n": 8, "unit": "fraction", "note": "thick",
    }  # fmt: skip
    assert Measurement.read("corruption", json.loads(json.dumps(row)), "") == FOG
    empty = Measurement(kind="health", metric="rank", value=None, unit="number")
    assert empty.row() == {"encoder": "trained", "metric": "rank", "value": None, "unit": "number"}
    assert Measurement.read("health", empty.row(), "") == empty


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    classes = ByClass(
        encoder="trained", classifier=Classifier(family="linear"), fitted_on="train", split="test",
        accuracies=[0.5, None], confused=[["a", "b", 3]], confusion=[[3, 3], [0, 0]],
    )  # fmt: skip
    records = Records([FOG, replace(FOG, value=None)], [classes], {"corruption": LAYOUT})
    written = Outcome(seed=3, chance=0.5, choices={"method": "moco", "negatives": None}, records=records)
    save(tmp_path, written)
    assert Outcome.load(tmp_path) == written


def test_factors_do_not_hide_fields() -> None:
    with pytest.raises(ValueError, match="a record has a field split of its own"):
        Measurement(kind="toy", value=0.0, factors={"split": "test"})


def test_records_are_found_and_joined() -> None:
    records = outcome(accuracy("a", 0.1), accuracy("b", 0.2), accuracy("b", 0.3, encoder="untrained")).records
    assert [r.value for r in records.where("accuracy", split="b")] == [0.2, 0.3]
    assert records.find("accuracy", split="b", encoder="untrained", classifier="linear") == records.measurements[2]
    assert records.find("accuracy", split="c") is None
    records.join(Records([records.measurements[0], FOG], layouts={"corruption": LAYOUT}))
    assert [record.value for record in records.measurements] == [0.1, 0.2, 0.3, 0.25]
    assert records.kinds() == ["accuracy", "corruption"]
    assert records.numbers() == {
        "linear/train/a": 0.1, "linear/train/b": 0.2, "corruption/linear-moco-10%/train/clean/fog/3": 0.25
    }  # fmt: skip
    records.layouts["corruption"] = replace(LAYOUT, folded=True)
    records.measurements.append(Measurement(kind="labels", metric="images", value=8, unit="count"))
    assert list(records.numbers()) == ["linear/train/a", "linear/train/b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"seed": 0, "rec', "Unterminated"),
        ("[]", "it does not hold a mapping"),
        ("{}", "seed is missing"),
        ('{"seed": "zero"}', 'seed should be int, not "zero"'),
        ({"records": []}, "records should be dict"),
        ({"records": {"accuracy": [{"value": "much"}]}}, 'records.accuracy.0.value should be float, not "much"'),
        ({"records": {"accuracy": [{"value": 1, "family": 3}]}}, "records.accuracy.0.classifier.family should be str"),
        ({"records": {"accuracy": [{"value": 1, "unit": "mile"}]}}, "records.accuracy.0.unit should be"),
        ({"records": {"accuracy": [{}]}}, "records.accuracy.0.value is missing"),
        ({"layouts": [{"kind": "a"}]}, "layouts.0.title is missing"),
        ({"by_class": [{"encoder": "trained"}]}, "by_class.0.classifier is missing"),
    ],
)
def test_a_damaged_file_is_one_sentence(content: Any, said: str, tmp_path: Path) -> None:
    text = content if isinstance(content, str) else json.dumps({"seed": 0, **content})
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError) as told:
        Outcome.load(tmp_path)
    assert str(told.value).startswith(f"{tmp_path}/results.json is damaged (")
    assert said in str(told.value)
    assert str(told.value).endswith("; restore it from a copy, or remove it and repeat the command of the run.")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no results\.json: the run failed or has not ended; give the folder of"):
        Outcome.load(tmp_path)
