"""Which of the processes that were started together this one is, as the environment says."""

import os

_SPECIAL_STEPS = 0xFFFFFFF0
"""SLURM numbers the batch script, the interactive shell and the like from here on: steps that hold one process."""


def outside_world_size() -> int | None:
    """Return how many processes were started together, by us, torchrun or srun; None for one alone."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    step = os.environ.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) < _SPECIAL_STEPS:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
        return tasks if tasks > 1 else None
    return None


def is_rank() -> bool:
    """Return whether this process trains together with others that are there already."""
    return outside_world_size() is not None


def is_first() -> bool:
    """Return whether this process speaks and writes: the first of those that train together, or the only one."""
    return not is_rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
