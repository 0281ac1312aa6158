"""Small files that are cut, empty, of another type, not UTF-8 or a folder: one sentence, in every command."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from support.inprocess import Answer, execute, finish
from support.tiny import DATA, composed

from icl_msr import evaluate, export
from icl_msr.cli.quilting import claim
from icl_msr.cli.sweeps import sweep_folder
from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.report import __main__ as report

DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2 + 1),
    "empty": lambda file: os.truncate(file, 0),
    "of another type": lambda file: file.write_text("[1, 2]\n"),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe\xfa" + file.read_bytes()),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}
CONFIG, FACTS, CURVES, RESULTS = "config.yaml", "environment.json", "metrics.csv", "results.json"
CAPTIONS, RECIPE, PREDICTIONS = "figures/captions.json", "encoder.json", "predictions.npz"
CHECKPOINT = "checkpoints/last.ckpt"
READ = {
    "resume": (CONFIG, FACTS, CURVES, CHECKPOINT),
    "finished": (CONFIG, FACTS, RESULTS),
    "evaluate": (CONFIG, FACTS, CHECKPOINT),
    "export": (CONFIG, FACTS, CHECKPOINT),
    "page": (CONFIG, FACTS, CURVES, RESULTS, CAPTIONS, RECIPE),
    "table": (CONFIG, FACTS, CURVES, RESULTS, PREDICTIONS),
}
"""The files that a command reads."""


def answer(command: Callable[..., int], *words: str) -> Answer:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = command(list(words))
    return Answer(code, out.getvalue(), err.getvalue())


COMMANDS: dict[str, Callable[[Path], Answer]] = {
    "resume": lambda run: execute(f"resume={run}"),
    "finished": lambda run: execute(f"resume={run}"),
    "evaluate": lambda run: answer(
        evaluate.main, f"run={run}", "evaluation=light", "cache=null", f"to={run.parent}/to"
    ),
    "export": lambda run: answer(export.main, str(run), "--to", f"{run.parent}/to"),
    "page": lambda run: answer(report.main, str(run)),
    "table": lambda run: answer(report.main, str(run.parent)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    return finish(tmp_path_factory.mktemp("damage"), "trainer.max_epochs=1", "~callbacks.online").folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return shutil.copytree(finished, tmp_path / "runs" / "run")


CASES = [
    pytest.param(command, file, damage, marks=[] if damage == "of another type" else pytest.mark.slow)
    for command, files in READ.items()
    for file in files
    for damage in DAMAGES
]


@pytest.mark.parametrize(("command", "file", "damage"), CASES)
def test_a_damaged_file_is_named_with_the_way_out(
    command: str, file: str, damage: str, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    if command == "resume":
        (run / RESULTS).unlink()
    if command == "table":
        shutil.copytree(finished, run.parent / "sound")
    DAMAGES[damage](run / file)
    code, out, err = COMMANDS[command](run)
    if damage == "cut" and file == CURVES:  # a killed process may leave half a row
        assert "is damaged" not in out + err
        return
    said = " ".join((out if command == "table" else err).split())
    assert f"run/{file}" in said
    assert ";" in said
    if command == "table":  # the other run has its row
        assert code == 0
        (row,) = json.loads((run.parent / "summary.json").read_text())["configurations"]
        assert row["runs"] == [str(run.parent / "sound")]
    else:
        assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_sweep_stops_no_other(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", "-m", "seed=0,1"])
    for name in ("2020-01-01", "2020-01-02"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(json.dumps({"command": sys.argv[1:], "finished": False}))
    DAMAGES[damage](tmp_path / "2020-01-02" / "sweep.json")
    assert sweep_folder(str(tmp_path)) == str(tmp_path / "2020-01-01")
    err = capsys.readouterr().err
    assert (err.count("\n"), "2020-01-02/sweep.json" in err, ";" in err) == (1, True, True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recipe_of_textures_is_not_replaced(damage: str, tmp_path: Path) -> None:
    claim(tmp_path, {"size": 8})
    DAMAGES[damage](tmp_path / "textures.json")
    with pytest.raises(UserError, match=r"textures\.json .*; "):
        claim(tmp_path, {"size": 9})


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage != "a folder"])
def test_a_damaged_cache_of_the_data_set_is_made_again(damage: str, tmp_path: Path) -> None:
    node = check(composed(*DATA, f"dataset.cache={tmp_path}")).dataset
    whole = build(node).train.images
    (file,) = tmp_path.iterdir()
    DAMAGES[damage](file)
    for _ in range(2):
        assert torch.equal(build(node).train.images, whole)
    assert file.stat().st_size > 1000
