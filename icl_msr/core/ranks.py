"""The rank of this process among those started together, read from the environment."""

import os

_SPECIAL_STEPS = 0xFFFFFFF0
"""First number of SLURM's special steps, such as the batch script and the interactive shell. Each is one process."""


def outside_world_size() -> int | None:
    """Return the number of processes that icl-msr, torchrun or srun started together; None for a single process."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    step = os.environ.get("SLURM_STEP_ID", "")
    if step.isdecimal() and int(step) < _SPECIAL_STEPS:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or 1)
        return tasks if tasks > 1 else None
    return None


def is_rank() -> bool:
    """Return whether this process was started as one of several that train together."""
    return outside_world_size() is not None


def is_first() -> bool:
    """Return whether this process prints and writes files: it is the first of several, or the only one."""
    return not is_rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
