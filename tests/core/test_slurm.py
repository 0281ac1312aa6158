"""What the program asks of SLURM, which is a script of these tests here; `tests/slurm` asks the real one."""

import os
from pathlib import Path

import pytest

from icl_msr.core import slurm

SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo "JobId=12 JobState=$STATE Reason=$REASON Restarts=$RESTARTS Command=a b"
elif [[ $REFUSES ]]; then echo "$REFUSES" >&2; exit 1
else echo "$@" >>"$ASKED"; fi
"""
BATCH = {"SLURM_JOB_ID": "12", "ENVIRONMENT": "BATCH", "STATE": "RUNNING", "REASON": "None", "RESTARTS": "0"}
GOES_ON = "SLURM job 12 is requeued and will continue this run."
CANCELLED = "SLURM job 12 was cancelled, so it is not requeued."
ITSELF = "SLURM itself runs job 12 again, and it will continue this run."
SITUATIONS: dict[str, tuple[dict[str, str], str, str]] = {
    "no job": ({"SLURM_JOB_ID": ""}, "hardware.requeue=true is for jobs of sbatch; this process is not in one.", ""),
    "an interactive job": (
        {"ENVIRONMENT": ""},
        "hardware.requeue=true is for jobs of sbatch; this process is not in one.",
        "",
    ),
    "a warning": ({}, GOES_ON, "requeue 12\n"),
    "a second warning": ({"RESTARTS": "1", "SLURM_RESTART_COUNT": "1"}, GOES_ON, "requeue 12\n"),
    "the time limit": ({"STATE": "COMPLETING", "REASON": "TimeLimit"}, GOES_ON, "requeue 12\n"),
    "scancel": ({"STATE": "COMPLETING"}, CANCELLED, ""),
    "pre-emption": ({"STATE": "COMPLETING", "RESTARTS": "1"}, ITSELF, ""),
    "a task of an array": (
        {"SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"},
        GOES_ON.replace("12", "11_3"),
        "requeue 11_3\n",
    ),
    "a job that may not be requeued": (
        {"REFUSES": "Requested operation is presently disabled."},
        "SLURM job 12 could not be requeued (Requested operation is presently disabled).",
        "",
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_when_a_job_is_requeued(situation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, sentence, asked = SITUATIONS[situation]
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {**BATCH, **variables, "ASKED": str(tmp_path / "asked")}.items():
        if value:
            monkeypatch.setenv(name, value)
    assert slurm.requeue() == sentence
    assert ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "") == asked


def test_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**BATCH, "PATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert slurm.requeue().startswith("SLURM job 12 could not be requeued ([Errno 2] No such file")
