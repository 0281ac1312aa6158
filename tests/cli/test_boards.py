"""Dashboards of W&B: the same files each time, without a server."""

import json
import sys
from pathlib import Path

import pytest

from icl_msr.dashboard import main


def test_dashboards_are_the_same_files_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder in ("a", "b"):
        assert main(["--to", str(tmp_path / folder)]) == 0
    assert "nothing is saved there" in capsys.readouterr().out
    for name in ("workspace-run", "workspace-sweep", "report"):
        first, second = ((tmp_path / folder / f"{name}.json").read_bytes() for folder in ("a", "b"))
        assert first == second
        text = json.dumps(json.loads(first))
        for part in ("Answer", "Background", "Training", "MSR", "Negatives", "Pictures", "System", "loss/contrastive"):
            assert part in text


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
