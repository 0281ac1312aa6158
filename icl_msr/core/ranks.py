"""Which of the processes that were started together this one is, as the environment says."""

import os


def outside_world_size() -> int | None:
    """How many processes were started together, by us, torchrun or srun; None for one alone."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # A batch script and an interactive shell are steps without a number.
    if os.environ.get("SLURM_STEP_ID", "").isdigit() and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return int(os.environ["SLURM_NTASKS"])
    return None


def is_rank() -> bool:
    """Whether this process trains together with others that are there already."""
    return outside_world_size() is not None


def is_first() -> bool:
    """Whether this process speaks and writes: the first of those that train together, or the only one."""
    return not is_rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0
