"""The folder of a run that names none: new, or known to every process that needs it."""

import os
import re
import sys
from pathlib import Path

import pytest
from support.programs import slurm_batch

from icl_msr.cli.footprint import Footprint, require_common_folder, run_folder
from icl_msr.core.errors import SharedMistake
from icl_msr.core.ranks import VARIABLES

BATCH = {**slurm_batch(2), "SLURM_JOB_ID": "12", "ENVIRONMENT": "BATCH"}
STEP = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3"}
RANK = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An empty working directory, and an environment in which nothing says that there are other processes."""
    for name in {*VARIABLES, "ENVIRONMENT", "TORCHELASTIC_RUN_ID", *(n for n in os.environ if n.startswith("SLURM_"))}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Footprint, "made", [])
    monkeypatch.setattr(sys, "argv", ["run", "seed=1"])
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def named(place: pytest.MonkeyPatch, **variables: str) -> str:
    """Return the folder that a process with these variables chooses."""
    with place.context() as here:
        for name, value in variables.items():
            here.setenv(name, value)
        return run_folder("runs", "moco-msr")


def test_a_command_makes_a_new_folder(place: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        folder = named(place)
        assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-moco-msr(-2)?", folder)
        assert Path(folder).is_dir()
    shell_of_salloc = slurm_batch(2)
    assert not named(place, **shell_of_salloc).startswith("runs/slurm")


def test_a_batch_job_finds_its_folder_again(place: pytest.MonkeyPatch) -> None:
    """Its ranks too, and another command of the same job has another one."""
    folder = named(place, **BATCH)
    assert re.fullmatch(r"runs/slurm/12-moco-msr-[0-9a-f]{6}", folder)
    assert not Path(folder).exists()
    assert named(place, **BATCH, SLURM_RESTART_COUNT="1") == folder
    assert named(place, **BATCH, **RANK, SLURM_STEP_ID="0") == folder
    place.setattr(sys, "argv", ["run", "seed=2"])
    assert named(place, **BATCH) != folder


def test_the_tasks_of_an_array_never_meet(place: pytest.MonkeyPatch) -> None:
    folders = []
    for task in range(4):
        numbers = {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": str(11 + task)}
        folders.append(named(place, **{**BATCH, **numbers}))
    assert [folder.partition("-")[0] for folder in folders] == [f"runs/slurm/11_{task}" for task in range(4)]


def test_ranks_agree_without_talking(place: pytest.MonkeyPatch) -> None:
    assert named(place, **STEP, **RANK) == "runs/slurm/12.3-moco-msr"
    assert named(place, **RANK, TORCHELASTIC_RUN_ID="a1") == "runs/torchrun/a1-moco-msr"
    shell_of_salloc = {**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)}  # the same for each command that is typed there
    assert named(place, **shell_of_salloc, **RANK, TORCHELASTIC_RUN_ID="a1") == "runs/torchrun/a1-moco-msr"


def test_ranks_that_cannot_agree_are_refused(place: pytest.MonkeyPatch) -> None:
    require_common_folder([])
    for name, value in {**RANK, "TORCHELASTIC_RUN_ID": "none"}.items():
        place.setenv(name, value)
    with pytest.raises(SharedMistake, match=r"add hydra\.run\.dir=FOLDER"):
        require_common_folder(["seed=1"])
    require_common_folder(["seed=1", "hydra.run.dir=here"])
    place.setenv("TORCHELASTIC_RUN_ID", "a1")
    require_common_folder(["seed=1"])
