"""Processes that this program starts: the ranks of a run on several devices, and the jobs of a sweep.

Lightning's own launcher repeats a whole sweep in its second rank and kills the first one without a word, so the process
that the user starts supervises, and each rank is a fresh `python -m icl_msr.run` with the same words.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

MODULE = "icl_msr.run"
GRACE = 15.0
"""Seconds that the other ranks have to end by themselves after one has died: a broken connection wakes them."""

_LEASH = "ICL_MSR_LEASH"
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", _LEASH),
)


def start(
    words: Sequence[str], environment: dict[str, str], output: IO[Any] | None = None
) -> "subprocess.Popen[bytes]":
    """`python -m icl_msr.run <words>` that ends when this process does, however that ends.

    The child reads from a pipe whose other end is ours alone, and leaves when it is closed; see `hold_leash`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, *words],
        env={**environment, _LEASH: "1"},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,  # Ctrl-C reaches it through us, once
    )


def hold_leash() -> None:
    """In a child of `start`: leave when the parent is gone."""
    if os.environ.pop(_LEASH, None) is None:
        return

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def clean_environment() -> dict[str, str]:
    """The environment without what says that this process is one of several ranks."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES and not name.startswith("TORCHELASTIC_")
    }


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


def run_ranks(world_size: int, words: Sequence[str], folder: Path) -> int:
    """Runs the command once a rank and returns the exit code of the whole.

    The first rank speaks; the others write to `rank-<r>.log` in the run's folder. When one dies, the others follow, and
    one sentence says which was the first and why.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**clean_environment(), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    common |= {"NODE_RANK": "0", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    ranks: list[subprocess.Popen[bytes]] = []
    with passed_on(ranks):
        for rank in range(world_size):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with logs[rank].open("wb") if rank else open(os.devnull, "wb") as output:
                ranks.append(start([*words, f"hydra.run.dir='{folder}'"], environment, output if rank else None))
        while (first := _first_failure(ranks)) is None and any(process.poll() is None for process in ranks):
            time.sleep(0.02)
        if first is None:
            return 0
        _end(ranks)
    code = ranks[first].returncode
    if first == 0 and code > 0:
        return code  # it has said why
    if code == 2:
        if ranks[0].returncode != 2:
            print(_last_line(logs[first]), file=sys.stderr)
        return 2
    cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with: {_last_line(logs[first])}"
    if code == -signal.SIGKILL:
        cause += " (out of memory?)"
    see = f"; see {logs[first]}" if first else ""
    print(f"Rank {first} of {world_size} {cause}, so the run was stopped{see}.", file=sys.stderr)
    return 1


def _first_failure(ranks: Sequence["subprocess.Popen[bytes]"]) -> int | None:
    return next((rank for rank, process in enumerate(ranks) if process.poll()), None)


def _end(ranks: Sequence["subprocess.Popen[bytes]"]) -> None:
    deadline = time.monotonic() + GRACE
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing said"


@contextmanager
def passed_on(children: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Signals go to the children, who know what to do, and this process waits for them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
