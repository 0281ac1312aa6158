"""Paired differences between configurations, and where they are shown."""

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel
from support.written import Page, accuracy, save, write_run

from icl_msr.core.errors import UserError
from icl_msr.core.records import Outcome
from icl_msr.report.__main__ import main
from icl_msr.report.differences import chance, compare, paired
from icl_msr.report.output import as_latex, as_markdown, write_summary
from icl_msr.report.summary import headline, summarise

METRIC = accuracy("original", 0.0).identity


def test_paired_is_a_t_test() -> None:
    first, second = [50.0, 52.0, 51.0, 55.0], [48.0, 51.5, 50.0, 52.0]
    found = paired([a - b for a, b in zip(first, second, strict=True)])
    assert found is not None
    interval = ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.detectable > found.high - found.mean
    assert paired([1.0]) is None
    assert paired([1.0, 1.1, 0.9]).real  # type: ignore[union-attr]
    assert not paired([1.0, -1.0, 0.5]).real  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_a_detectable_difference_is_found_in_four_cases_of_five(n: int) -> None:
    noise = np.random.default_rng(0).normal(size=(40_000, n))
    errors = noise.std(1, ddof=1) / math.sqrt(n)
    found = paired([1.0, 0.0, *[0.5] * (n - 2)])
    assert found is not None
    standard = statistics.stdev([1.0, 0.0, *[0.5] * (n - 2)]) / math.sqrt(n)
    reach, true = (found.high - found.mean) / standard, found.detectable / standard / math.sqrt(n)
    assert np.mean(np.abs(noise.mean(1) + true) > reach * errors) == pytest.approx(0.8, abs=0.01)


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        found = paired(random.normal(1.0, 3.0, 5).tolist())
        assert found is not None
        hits += found.low < 1.0 < found.high
    assert 0.935 < hits / 2000 < 0.965


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for method in ("moco", "byol"):
        for regularizer in ("none", "msr"):
            for seed in (0, 1, 2):
                write_run(tmp_path / f"{method}-{regularizer}-{seed}", method, regularizer, seed)
    return tmp_path


def test_each_is_compared_with_what_lacks_the_addition(runs: Path) -> None:
    rows = summarise([runs]).configurations
    compared = compare(rows, headline(rows))
    assert [(row.configuration.label, row.against.label) for row in compared] == [
        ("byol · msr", "byol · none"),
        ("moco · msr", "moco · none"),
    ]
    row = compared[-1]
    values = [
        a - b for a, b in zip(row.configuration.metrics[METRIC].values, row.against.metrics[METRIC].values, strict=True)
    ]
    assert row.differences[METRIC] == paired(values)
    named = compare(rows, headline(rows), against="byol · msr")
    assert {row.against.label for row in named} == {"byol · msr"}
    assert len(named) == 3
    for wrong in ("nothing", "moco"):
        with pytest.raises(UserError, match=f"--against {wrong} names (no row|2 rows) of confounded"):
            compare(rows, headline(rows), against=wrong)


def test_without_anything_to_add_the_first_row_is_the_baseline(tmp_path: Path) -> None:
    for method in ("moco", "byol", "simclr"):
        for seed in (0, 1):
            write_run(tmp_path / f"{method}-{seed}", method, "none", seed)
    compared = compare(summarise([tmp_path]).configurations, [METRIC])
    assert [(row.configuration.label, row.against.label) for row in compared] == [("moco", "byol"), ("simclr", "byol")]


def test_they_are_in_every_file(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise([runs])
    rows = summary.configurations
    compared = compare(rows, headline(rows))
    cell = str(compared[-1].differences[METRIC])
    assert cell in as_markdown(summary)
    tex = as_latex(summary)
    lines = [[c.strip() for c in line.removesuffix(r"\\").split(" & ")] for line in tex.splitlines() if " & " in line]
    assert any(cell.replace("−", "$-$") in [re.sub(r"\\textbf\{(.*)\}", r"\1", c) for c in line] for line in lines)
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 2
    assert not re.search(r"(?<!\\)[%_#]", tex.partition("\n")[2])
    files = {file.name: file for file in write_summary(summary, runs)}
    assert files["summary.tex"].read_text() == tex
    saved = json.loads(files["summary.json"].read_text())["differences"]
    (mine,) = (d for d in saved[-1]["differences"] if (d["name"], d["encoder"]) == (METRIC.name, "trained"))
    assert mine["mean"] == pytest.approx(compared[-1].differences[METRIC].mean)
    page = Page(files["report.html"])
    page.assert_self_contained()
    assert len(page.tables["differences"]) == 1 + len(compared)
    assert main([str(runs), "--out", str(runs / "out"), "--against", "nothing"]) == 2
    assert "names no row" in capsys.readouterr().err
    assert main([str(runs), "--out", str(runs / "out")]) == 0
    assert chance(compared) in " ".join(capsys.readouterr().out.split())


def predictions(folder: Path, right: list[bool], labels: list[int]) -> None:
    predicted = [label if hit else label + 1 for label, hit in zip(labels, right, strict=True)]
    content = {"labels/original": np.array(labels), "trained/linear/train/original": np.array(predicted)}
    np.savez(folder / "predictions.npz", **content)


def test_of_one_seed_images_are_paired(tmp_path: Path) -> None:
    for regularizer in ("none", "msr"):
        run = write_run(tmp_path / regularizer, "moco", regularizer, 0)
        results = Outcome.load(run)
        results.records.measurements = [replace(record, n=100) for record in results.records.measurements]
        save(run, results)
    labels = [k % 3 for k in range(100)]
    predictions(tmp_path / "none", [k < 50 for k in range(100)], labels)
    predictions(tmp_path / "msr", [k < 60 for k in range(100)], labels)
    rows = summarise([tmp_path]).configurations
    (row,) = compare(rows, [METRIC])
    found = row.differences[METRIC]
    assert (found.over, found.n) == ("images", 100)
    assert found.mean == pytest.approx(10)
    error = 100 * np.std([0.0] * 90 + [1.0] * 10, ddof=1) / 10
    assert found.high - found.mean == pytest.approx(1.959964 * error)
    assert "image by image" in chance([row])
    for name, right in (("none", 50), ("msr", 60)):  # each image under three corruptions is still one image
        predictions(tmp_path / name, [k < right for k in range(100)] * 3, labels * 3)
    (again,) = compare(rows, [METRIC])
    assert again.differences[METRIC] == found
    predictions(tmp_path / "none", [k < 50 for k in range(100)], labels)
    predictions(tmp_path / "msr", [k < 60 for k in range(100)], labels[::-1])  # other images
    assert compare(rows, [METRIC]) == []
    (tmp_path / "msr/predictions.npz").unlink()
    assert compare(rows, [METRIC]) == []
