"""The script for a GPU runs on a CPU, with tiny sizes."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "experiments" / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = spec_from_file_location("gpu_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(gpu: ModuleType, folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    code = gpu.main(["--out", str(folder), "--dry-run", *words])
    found = {row["row"]: row for row in json.loads((folder / "gpu.json").read_text())["rows"]}
    assert code == any(row.get("passed") is False for row in found.values())
    return found


QUICK = ["random numbers and views", "against the CPU, wmse", "resume, moco", "no wait, byol", "simclr MSR"]


def test_a_dry_run(gpu: ModuleType, tmp_path: Path) -> None:
    found = ran(gpu, tmp_path, "--only", *QUICK)
    assert all("Error" not in str(row.get("note")) for row in found.values())
    assert found["random numbers and views"]["passed"] is True
    assert found["against the CPU, wmse"]["passed"] is True
    assert found["resume, moco"]["passed"] is True
    assert found["no wait, byol"]["note"] == "no GPU here"
    assert found["simclr MSR"]["ratio"] > 0
    assert {"views", "forward", "L_msr", "backward", "phi's step"} <= found["simclr MSR"]["stages, ms"].keys()
    text = (tmp_path / "gpu.md").read_text()
    assert "| simclr, batch 8, MSR default |" in text
    assert "a dry run" in text


@pytest.mark.slow
def test_every_row_runs(gpu: ModuleType, tmp_path: Path) -> None:
    found = ran(gpu, tmp_path, "--budget", "3600")
    assert len(found) == len(gpu.rows(gpu.DRY))
    assert not [row for row in found.values() if row.get("passed") is False or "not measured" in str(row.get("note"))]


def test_without_time_every_row_says_so(gpu: ModuleType, tmp_path: Path) -> None:
    found = ran(gpu, tmp_path, "--budget", "0")
    assert len(found) == len(gpu.rows(gpu.DRY))
    assert {row["note"] for row in found.values()} == {"not measured: no time left"}


def test_a_row_is_cut_off_and_a_mistake_is_written_down(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forever(bench: Any) -> dict[str, Any]:
        while True:
            torch.zeros(1)

    def broken(bench: Any) -> dict[str, Any]:
        raise ValueError("not today")

    listed = [gpu.Row("Speed", "broken", 1.0, broken), gpu.Row("Speed", "forever", 1.0, forever)]
    monkeypatch.setattr(gpu, "rows", lambda scale: [*listed, gpu.Row("Speed", "after", 1.0, forever)])
    found = ran(gpu, tmp_path, "--budget", "2")
    assert found["broken"]["note"] == "ValueError: not today"
    assert found["forever"]["note"] == "not measured: cut off by the budget"
    assert found["after"]["note"] == "not measured: no time left"


def test_what_is_not_right_is_seen(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that forgets the optimiser, and a step in single precision that is another one."""
    load, plain = gpu.Training.load, gpu.gradients

    def forgets(self: Any, state: dict[str, Any]) -> None:
        load(self, state | {"optimizer": self.optimizer.state_dict()})

    def other(bench: Any, name: str, device: torch.device, dtype: torch.dtype) -> Any:
        loss, theta, phi = plain(bench, name, device, dtype)
        return [loss, [2 * g for g in theta] if dtype == torch.float32 else theta, phi]

    monkeypatch.setattr(gpu.Training, "load", forgets)
    monkeypatch.setattr(gpu, "gradients", other)
    found = ran(gpu, tmp_path, "--only", "resume, simclr", "against the CPU, simclr")
    assert [row["passed"] for row in found.values()] == [False, False]
