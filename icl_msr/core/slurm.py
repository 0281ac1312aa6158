"""What the program asks of SLURM: the job that it runs in, and to run this job again."""

import os
import subprocess
from collections.abc import Mapping

_SPECIAL_STEPS = 0xFFFFFFF0
"""First number of SLURM's special steps, such as the batch script and the interactive shell. Each is one process."""


def step(known: Mapping[str, str]) -> str | None:
    """Return the number of the step in which `srun` has started this process; None if it has not."""
    number = known.get("SLURM_STEP_ID", "")
    return number if number.isdecimal() and int(number) < _SPECIAL_STEPS else None


def job() -> str | None:
    """Return the number of this SLURM job as scontrol takes it, `12_3` for a task of an array; None outside a job."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def in_batch_job() -> bool:
    """Return whether this process belongs to a job of sbatch, which SLURM may start again from the beginning."""
    return job() is not None and os.environ.get("ENVIRONMENT") == "BATCH"


def requeue() -> str:
    """Ask SLURM to run this job again, and return a sentence that says what came of it.

    SLURM ends the job at once, so this is the last thing that a process does. A job that somebody has cancelled is not
    run again.
    """
    number = job()
    if number is None or not in_batch_job():
        return "hardware.requeue=true is for jobs of sbatch; this process is not in one."
    try:
        known = facts(number)
        if int(known.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            return f"SLURM itself runs job {number} again, and it will continue this run."
        # At the time limit and after scancel, the state is COMPLETING.
        if known.get("JobState") != "RUNNING" and known.get("Reason") != "TimeLimit":
            return f"SLURM job {number} was cancelled, so it is not requeued."
        _scontrol("requeue", number)
    except (OSError, subprocess.SubprocessError) as error:
        said = " ".join((getattr(error, "stderr", "") or str(error)).split()).rstrip(".")
        return f"SLURM job {number} could not be requeued ({said})."
    return f"SLURM job {number} is requeued and will continue this run."


def facts(number: str) -> Mapping[str, str]:
    """Return what SLURM knows of a job.

    Raises:
        OSError, subprocess.SubprocessError: SLURM does not answer or does not know the job.
    """
    first, *_ = _scontrol("show", "job", "--oneliner", number).splitlines() or [""]
    return dict(word.partition("=")[::2] for word in first.split())


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
