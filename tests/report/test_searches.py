"""The best trials of a search on the terminal, on the page and in the files of a summary."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.written import write_run

from icl_msr.report.__main__ import main
from icl_msr.report.searches import Trial, best_trials


def searched(folder: Path, *solutions: dict[str, Any]) -> Path:
    """Write the folder of a search with two runs."""
    for number, regularizer in enumerate(("none", "msr")):
        (write_run(folder / str(number), "moco", regularizer, 0) / "report.html").write_text("<html></html>")
    content = {"name": "optuna", "failed": 1, "solutions": list(solutions)}
    (folder / "optimization_results.yaml").write_text(yaml.safe_dump(content))
    return folder


BEST = {"folder": "begun/elsewhere/1", "params": {"method.temperature": 0.5}, "values": {"metric": 0.75}}
OTHER = {"folder": "0", "params": {"method.temperature": "<b>"}, "values": {"metric": 0.5, "wall_time_s": 2.0}}


def test_the_best_trials_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = searched(tmp_path / "sweep", BEST, OTHER)
    assert main([str(folder)]) == 0
    first = f"metric 0.7500 in {folder}/1 with method.temperature=0.5"
    second = f"metric 0.5000, wall_time_s 2.0000 in {folder}/0 with method.temperature=<b>"
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("Best")] == [f"Best trial: {first}", f"Best trial: {second}"]
    page = (folder / "report.html").read_text()
    assert 'metric 0.7500 with <code>method.temperature=0.5</code> in <a href="1/report.html">' in page
    assert "<b>" not in page.partition("metric 0.5000, wall_time_s 2.0000 with <code>method.temperature=")[2][:10]
    assert [one["folder"] for one in json.loads((folder / "summary.json").read_text())["best"]] == [
        str(folder / "1"), str(folder / "0"),
    ]  # fmt: skip
    assert (
        f"Best trial: metric 0.7500 in `{folder}/1` with `method.temperature=0.5`"
        in (folder / "summary.md").read_text()
    )


def test_a_search_is_found_above_its_runs(tmp_path: Path) -> None:
    folder = searched(tmp_path / "sweep", BEST)
    assert main([str(tmp_path)]) == 0
    assert 'href="sweep/1/report.html"' in (tmp_path / "report.html").read_text()
    found, damaged = best_trials([folder, folder, tmp_path])
    assert (found, damaged) == ([Trial(str(folder / "1"), {"method.temperature": 0.5}, {"metric": 0.75})], [])


@pytest.mark.parametrize("text", ["[", "solutions: 3", "solutions: [{folder: a}]", "- a", "a: &a [1]\nb: *a"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    folder = searched(tmp_path / "sweep")
    (folder / "optimization_results.yaml").write_text(text)
    found, ((path, reason),) = best_trials([folder])
    assert (found, path) == ([], folder / "optimization_results.yaml")
    assert str(path) in reason
    assert main([str(folder)]) == 0
    assert "Best trial" not in (folder / "report.html").read_text()


def test_the_file_of_another_sweeper_has_no_trials(tmp_path: Path) -> None:
    folder = searched(tmp_path / "sweep")
    (folder / "optimization_results.yaml").write_text("{name: nevergrad, best_evaluated_result: 0.3}")
    assert best_trials([folder]) == ([], [])
