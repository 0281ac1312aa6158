"""Grids of runs: what is left to do, and the statistics of the table."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel
from support.tiny import DATA, MODEL

from experiments import study

GRID = """
common: regularizer=none loader.batch_size=8
large: dataset.train=$many
seeds: [0, 1]
headline: [linear/train/full, knn/train/test]
rows:
  plain: {words: method=simclr}
  other: {words: method=byol $large, seeds: [3], baseline: plain}
  elsewhere: {words: method=byol dataset.root=$folder}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path


def record(folder: Path, row: str, seed: int, **metrics: float) -> None:
    with (folder / "results.jsonl").open("a") as file:
        content: dict[str, Any] = {
            "row": row,
            "seed": seed,
            "metrics": {k.replace("_", "/"): v for k, v in metrics.items()},
        }
        file.write(json.dumps(content) + "\n")


def test_rows_without_their_data_wait(folder: Path) -> None:
    assert list(study.rows(folder, {})) == ["plain"]
    rows = study.rows(folder, {"many": "64"})
    assert list(rows) == ["plain", "other"]
    assert rows["plain"]["words"] == ["regularizer=none", "loader.batch_size=8", "method=simclr"]
    assert rows["other"]["words"][-1] == "dataset.train=64"
    assert rows["other"]["seeds"] == [3]


def test_only_what_is_missing_is_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def execute(folder: Path, name: str, words: list[str], then: dict[str, list[str]], seed: int) -> dict[str, Any]:
        asked.append((name, seed))
        return {"metrics": {}}

    monkeypatch.setattr(study, "execute", execute)
    record(folder, "plain", 1)
    left = "python -m icl_msr.run regularizer=none loader.batch_size=8 method="
    study.main(["run", str(folder), "--dry", "many=64"])
    assert capsys.readouterr().out.splitlines() == [
        f"{left}simclr seed=0",
        f"{left}byol dataset.train=64 seed=3",
        "2 runs are left, 1 are done.",
    ]
    study.run(folder, {"many": "64"}, jobs=2)
    assert sorted(asked) == [("other", 3), ("plain", 0)]
    study.run(folder, {"many": "64"}, jobs=2)
    assert len(asked) == 2


def test_paired_differences() -> None:
    first, second = [50.0, 52.0, 51.0, 55.0], [48.0, 51.5, 50.0, 52.0]
    values = [a - b for a, b in zip(first, second, strict=True)]
    low, high = ttest_rel(first, second).confidence_interval(0.95)
    found = study.difference(values).replace("−", "-").strip("*")
    assert found.startswith(f"{statistics.fmean(values):+.1f} ({low:.1f} to {high:.1f}; ")
    assert study.difference([1.0, 1.1, 0.9]).startswith("**+1.0")
    assert not study.difference([1.0, -1.0, 0.5]).startswith("**")


def test_rows_of_other_data_stand_in_tables_of_their_own(folder: Path) -> None:
    record(folder, "plain", 0, linear_train_full=50.0)
    record(folder, "plain", 1, linear_train_full=52.0)
    record(folder, "other", 0, linear_train_full=51.0)
    record(folder, "other", 1, linear_train_full=54.0)
    record(folder, "elsewhere", 0, knn_train_test=20.0)
    lines = study.table(folder).splitlines()
    assert "| plain | 2 | 51.0 ± 1.4 |" in lines
    assert "| elsewhere | 1 | 20.0 |" in lines
    assert any(line.startswith("| other | plain | +1.5 (") for line in lines)
    assert sum("mean ± std" in line for line in lines) == 2


@pytest.mark.slow
def test_a_real_run_leaves_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = " ".join(
        [*DATA, *MODEL, "trainer.max_epochs=1", "trainer.log_every_n_steps=2", "evaluation=light", "logger=csv"]
    )
    again = "evaluation=light evaluation.untrained=false hardware=cpu"
    (tmp_path / "grid.yaml").write_text(
        f"common: {words}\nseeds: [0]\nheadline: [knn-dino/train/original]\nevaluations: {{again: {again}}}\n"
        "rows:\n  one: {words: method=simclr, then: [again]}\n"
    )
    study.run(tmp_path, {}, jobs=1)
    (found,) = study.records(tmp_path)
    assert found["row"] == "one"
    assert 0 <= found["metrics"]["knn-dino/train/original"] <= 100
    assert found["metrics"]["again: knn-dino/train/original"] == found["metrics"]["knn-dino/train/original"]
    assert found["curves"]["loss"]


def test_the_learnt_gap_is_trained_minus_untrained(folder: Path) -> None:
    gap = "linear/train/full - fg"
    (folder / "grid.yaml").write_text(GRID.replace("headline: [", f"headline: [{gap}, "))
    for row, values in (("plain", (5.0, 6.0, 7.0)), ("other", (5.5, 6.0, 6.5))):
        for seed, value in enumerate(values):
            record(folder, row, seed, **{gap: value, f"{gap} (untrained)": 2.0 + seed / 2})
    lines = [cells.strip("| ").split(" | ") for cells in study.table(folder).splitlines() if f"| {gap} | 3 |" in cells]
    plain, other = lines
    assert plain[:5] == ["plain", gap, "3", "6.0", "2.5"]
    assert plain[5].startswith("+3.5 (")
    assert len(plain) == 6  # a baseline is compared with nothing
    change = study.paired([0.5, 0.0, -0.5])
    assert change is not None
    assert other[6] == f"{100 * change.detectable / 3.5:.0f} %"


EXPERIMENTS = Path(study.__file__).parent
PUBLISHED = ("encoders", "msr", "negatives")
"""The folders whose README shows the table of the grid's results."""


def tables(page: str) -> list[str]:
    """The lines of a page that belong to tables of a study."""
    found, inside = [], False
    for line in page.splitlines():
        inside = line.startswith("|") and (inside or line.startswith(("| mean ±", "| difference, ", "| gap, ")))
        found += [line] if inside else []
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_those_of_the_results(name: str) -> None:
    published = tables((EXPERIMENTS / name / "README.md").read_text())
    made = study.table(EXPERIMENTS / name).splitlines()
    assert len(published) > 10
    assert [line for line in published if line not in made] == []
