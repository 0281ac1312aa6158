"""The rank of this process among those started together.

torchrun's variables say it. `adopt` sets them from those of SLURM and Open MPI when a command begins, so nothing else
reads other variables.
"""

import os
import re
from collections.abc import Mapping
from zlib import crc32

from icl_msr.core import slurm
from icl_msr.core.errors import UserError

VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""The variables that mark a process as one of several ranks."""


def adopt() -> None:
    """Set torchrun's variables if `srun` or `mpirun` has started this process as one of several.

    An allocation without `srun` is one process. `MASTER_ADDR` and `MASTER_PORT` stay if the user has set them.

    Raises:
        UserError: `mpirun` has started processes on several machines, and nothing says which is the first.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun or icl-msr has started this process
        return
    # mpirun may start its own processes by srun, so its variables come first.
    for name, value in (_of_open_mpi(os.environ) or _of_slurm(os.environ)).items():
        if name.startswith("MASTER_"):
            os.environ.setdefault(name, value)
        else:
            os.environ[name] = value


def _of_open_mpi(known: Mapping[str, str]) -> dict[str, str]:
    size = int(known.get("OMPI_COMM_WORLD_SIZE", 1))
    if size == 1:
        return {}
    local_size = int(known["OMPI_COMM_WORLD_LOCAL_SIZE"])
    first = "127.0.0.1" if local_size == size else known.get("MASTER_ADDR") or first_host(known.get("SLURM_NODELIST"))
    if not first:
        raise UserError(
            "mpirun has started ranks on several machines; say which is the first: "
            "mpirun -x MASTER_ADDR=<host> -x MASTER_PORT=29500 ..."
        )
    run = known.get("PMIX_NAMESPACE") or known.get("OMPI_MCA_ess_base_jobid", "")
    rank, local_rank = int(known["OMPI_COMM_WORLD_RANK"]), int(known["OMPI_COMM_WORLD_LOCAL_RANK"])
    return _variables(rank, size, local_rank, local_size, rank // local_size, -(-size // local_size), first, run)


def _of_slurm(known: Mapping[str, str]) -> dict[str, str]:
    step = slurm.step(known)
    size = int(known.get("SLURM_STEP_NUM_TASKS") or known.get("SLURM_NTASKS") or 1)
    if step is None or size == 1:
        return {}
    nodes = int(known.get("SLURM_STEP_NUM_NODES") or known.get("SLURM_NNODES") or 1)
    node = int(known.get("SLURM_NODEID", 0))
    local_sizes = _tasks_per_node(known.get("SLURM_STEP_TASKS_PER_NODE") or str(size))
    first = "127.0.0.1" if nodes == 1 else first_host(known.get("SLURM_STEP_NODELIST") or known.get("SLURM_NODELIST"))
    run = f"{known.get('SLURM_JOB_ID')}.{step}"
    rank, local_rank = int(known["SLURM_PROCID"]), int(known["SLURM_LOCALID"])
    return _variables(rank, size, local_rank, local_sizes[node], node, nodes, first or "127.0.0.1", run)


def _variables(
    rank: int, size: int, local_rank: int, local_size: int, node: int, nodes: int, first: str, run: str
) -> dict[str, str]:
    """Return torchrun's variables. The port follows from `run`, a name that only these processes have."""
    numbers = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
    numbers |= {"GROUP_RANK": node, "NODE_RANK": node, "GROUP_WORLD_SIZE": nodes}
    # Below the ports that systems give to outgoing connections.
    return {**{name: str(n) for name, n in numbers.items()}, "MASTER_ADDR": first, "MASTER_PORT": _port(run)}


def _port(run: str) -> str:
    return str(20000 + crc32(run.encode()) % 10000)


def first_host(hosts: str | None) -> str | None:
    """Return the first host of a list as SLURM writes it: `n07` for `n[07-09,12],gpu1`."""
    if not hosts:
        return None
    whole = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert whole
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", whole[0])


def _tasks_per_node(sizes: str) -> list[int]:
    """Return the number of tasks on each node: [2, 2, 1] for `2(x2),1`."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", sizes)
    return [int(size) for size, times in pairs for _ in range(int(times or 1))]


def outside_world_size() -> int | None:
    """Return the number of processes that were started together; None for a single process."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else None


def outside_nodes() -> int | None:
    """Return the number of machines on which processes were started together; None if that is not known."""
    return int(os.environ["GROUP_WORLD_SIZE"]) if is_rank() and "GROUP_WORLD_SIZE" in os.environ else None


def is_rank() -> bool:
    """Return whether this process was started as one of several that train together."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Return whether this process prints and writes files: it is the first of several, or the only one."""
    return not is_rank() or int(os.environ["RANK"]) == 0
