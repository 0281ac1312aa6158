"""Dashboards of W&B: the same files each time, without a server."""

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.inprocess import finish
from support.uploads import sent

from icl_msr.dashboard import main


def test_dashboards_are_the_same_files_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder in ("a", "b"):
        random.random()  # the state of the generator is another one each time
        assert main(["--to", str(tmp_path / folder)]) == 0
    assert "nothing is saved there" in capsys.readouterr().out
    for name in ("workspace-run", "workspace-sweep", "report"):
        first, second = ((tmp_path / folder / f"{name}.json").read_bytes() for folder in ("a", "b"))
        assert first == second
        text = json.dumps(json.loads(first))
        for part in ("Answer", "Background", "Training", "MSR", "Negatives", "Pictures", "System", "loss/contrastive"):
            assert part in text


def keys(node: Any) -> Iterator[str]:
    """Yield the names of logged values that the panels of a dashboard show."""
    if isinstance(node, list):
        for item in node:
            yield from keys(item)
    elif isinstance(node, dict):
        if node.get("name") == "pick":  # of a table
            yield node["inputs"]["key"]["val"]
        elif node.get("viewType") and isinstance(node.get("config"), dict):
            config = node["config"]
            yield from [*config.get("metrics", []), *config.get("mediaKeys", [])]
            yield from [config[key] for key in ("targetKey", "xAxis") if config.get(key) not in (None, "_runtime")]
        for item in node.values():
            yield from keys(item)


def panels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["--to", str(folder)]) == 0
    found = [set(keys(json.loads(file.read_text()))) for file in sorted(folder.iterdir())]
    assert len(found) == 3
    assert all(names >= found[1] for names in found)  # the workspaces and the report show the same
    return set.union(*found)


def test_panels_show_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = panels(tmp_path, monkeypatch)
    assert {"metric", "loss", "report", "records/accuracy", "pictures/views", "trainer/global_step"} <= found
    assert "linear/train/mixed_same_minus_mixed_rand_points" in found
    assert all(re.fullmatch(r"\w+(/[\w.]+)*", name) for name in found)


@pytest.mark.slow
def test_a_run_logs_what_every_panel_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = panels(tmp_path / "boards", monkeypatch)
    done = finish(tmp_path, "logger=wandb", "evaluation=default", "regularizer.every=1", "trainer.max_epochs=1")
    (run,) = sent(done.folder)
    logged = {name for row in run.history for name in row} | set(run.summary) | {f"system/{name}" for name in run.stats}
    assert sorted(found - logged) == []


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for module in [name for name in sys.modules if name.startswith(("wandb_workspaces.", "icl_msr.cli.boards"))]:
        monkeypatch.delitem(sys.modules, module)
    import icl_msr.cli

    monkeypatch.delattr(icl_msr.cli, "boards", raising=False)
    assert main(["--to", str(tmp_path)]) == 2
    assert "pip install 'icl-msr[wandb]'" in capsys.readouterr().err
