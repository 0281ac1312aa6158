"""Processes that this program starts: the ranks of a run on several devices, and the jobs of a sweep.

Lightning's launcher repeats a whole sweep in its second rank and kills the first rank without a message. Here the
process that the user starts supervises, and each rank is a fresh process with the same arguments.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from icl_msr.core import slurm
from icl_msr.core.errors import PREEMPTED, SharedMistake, UserError
from icl_msr.core.ranks import VARIABLES, is_first, is_rank, outside_nodes, outside_world_size
from icl_msr.core.signals import give_back, take_signals

if TYPE_CHECKING:  # it imports torch, which a supervisor does not need
    from icl_msr.training.hardware import Plan

MODULE = "icl_msr.run"
GRACE = 15.0
"""Seconds that the other ranks have to end by themselves after one has died. A broken connection wakes them."""

_LEASH = "ICL_MSR_LEASH"
_held = False
_RANK_VARIABLES = (*VARIABLES, "PL_GLOBAL_SEED", _LEASH)


class Child(subprocess.Popen[bytes]):
    """A process `python -m <module> <words>` that ends when this process ends, even if this one is killed.

    Its standard input is a socket. Only this process holds the other end. The child exits when that end closes, see
    `hold_leash`. A rank also reports its exception through the socket, see `told`.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str],
        output: IO[Any] | None = None,
        module: str | None = None,
    ):
        self.leash, theirs = socket.socketpair()
        self.leash.setblocking(False)
        self._said = b""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child holds the leash
        try:
            super().__init__(
                [sys.executable, "-m", module or MODULE, *words],
                env={**environment, _LEASH: "1"},
                stdin=theirs.fileno(),
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,  # this process passes Ctrl-C on, so the child gets it once
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def fault(self) -> tuple[float, str, str] | None:
        """Return the monotonic time of a failure, the exception in one line and the traceback; None if it has none."""
        with suppress(OSError):
            while part := self.leash.recv(1 << 16):
                self._said += part
        when, _, text = self._said.decode(errors="replace").partition(" ")
        cause, _, trace = text.partition("\n")
        return (float(when), cause, trace) if text else None


def hold_leash() -> None:
    """Exit this process, a `Child`, when its parent is gone."""
    if os.environ.pop(_LEASH, None) is None:
        return

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    try:
        # Signals were blocked until here: a Ctrl-C during imports would print the traceback of an import.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except KeyboardInterrupt:
        sys.exit(130)
    global _held
    _held = True


def told(fault: Exception) -> bool:
    """Report this rank's exception to the parent, and return whether there is a parent of `run_ranks`.

    A rank reports before the others fail because of it. So the parent knows which rank failed first and prints only
    its error.
    """
    if not (_held and is_rank()):
        return False
    text = "".join(traceback.format_exception(fault))
    reason = str(fault).strip().partition("\n")[0]
    cause = f"{type(fault).__name__}: {reason}" if reason else type(fault).__name__
    with socket.socket(fileno=os.dup(0)) as leash:
        leash.sendall(f"{time.monotonic()} {cause}\n{text}".encode())
    if not is_first():
        sys.stderr.write(text)  # goes to the rank's log
    return True


def clean_environment(processes: int = 1) -> dict[str, str]:
    """Return the environment without the variables that mark this process as one of several ranks.

    With several processes side by side, each gets its share of the processors, because they would slow each other down.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    if processes > 1:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, processors // processes)))
    return environment


def require_processes(plan: "Plan", multirun: bool = False) -> None:
    """Check that there can be one process per device. A sweep within this process has only one.

    Raises:
        SharedMistake: the processes that were started do not match the config.
        UserError: the processes cannot be started.
    """
    started, nodes = outside_world_size(), outside_nodes() or plan.nodes
    if started is not None and (started, nodes) != (plan.world_size, plan.nodes):
        each, rest = divmod(started, nodes)
        advice = "start as many on each" if rest else f"type hardware.devices={each} hardware.nodes={nodes}"
        raise SharedMistake(
            f"{started} processes were started together on {nodes} machine{'s' * (nodes > 1)}, and hardware.devices="
            f"{plan.devices} hardware.nodes={plan.nodes} needs {plan.world_size}; {advice}, or start a single process."
        )
    if plan.world_size == 1 or is_rank():
        return
    if multirun:
        raise UserError(
            "A sweep over several devices needs processes of its own for each job; add hydra/launcher=process."
        )
    if plan.nodes > 1:
        raise UserError(
            f"hardware.nodes={plan.nodes} needs the command to be started on every node, by torchrun or srun; "
            "a single machine takes hardware.nodes=1."
        )


def in_folder(folder: Path) -> str:
    """Return the override that makes a run write to this folder."""
    quoted = str(folder).replace("'", r"\'")
    return f"hydra.run.dir='{quoted}'"


def run_ranks(world_size: int, words: Sequence[str], folder: Path, module: str | None = None) -> int:
    """Run `python -m <module>` once per rank and return the exit code of the whole.

    The first rank prints to the terminal. The others write to `rank-<r>.log` in the folder. When one rank dies, the
    others are ended, and one sentence names the first that failed and the reason.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**clean_environment(world_size), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    common |= {"NODE_RANK": "0", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    ranks: list[Child] = []
    with passed_on(ranks) as signals:
        for rank in range(world_size):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with logs[rank].open("wb") if rank else nullcontext() as output:
                ranks.append(Child(words, environment, output, module))
        while (first := _first_failure(ranks)) is None and _running(ranks):
            time.sleep(0.02)
        if first is not None:
            _end(ranks)
    code = 0 if first is None else _explained(first, ranks, logs[first], signals)
    for child, log in zip(ranks, logs, strict=True):
        child.leash.close()
        if log.exists() and not log.stat().st_size:
            log.unlink()
    return code


def _first_failure(ranks: Sequence[Child]) -> int | None:
    """Return the rank that failed first; None while none has failed.

    A killed rank cannot report, and another rank may report the broken connection at once.
    """
    codes = [rank.poll() or 0 for rank in ranks]
    killed = [number for number, code in enumerate(codes) if code < 0]
    failed = sorted((fault, number) for number, rank in enumerate(ranks) if (fault := rank.fault()))
    ended = [number for number, code in enumerate(codes) if code]
    return next(iter([*killed, *(number for _, number in failed), *ended]), None)


def _running(ranks: Sequence[Child]) -> bool:
    """Return whether a rank still runs. Read their reports, since a rank would wait for a full socket."""
    for rank in ranks:
        rank.fault()
    return any(rank.poll() is None for rank in ranks)


def _end(ranks: Sequence[Child]) -> None:
    deadline = time.monotonic() + GRACE
    while _running(ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def _explained(first: int, ranks: Sequence[Child], log: Path, signals: Sequence[int]) -> int:
    """Return the exit code of a run whose rank `first` failed. Print the reason if that rank has not."""
    code, see, say = ranks[first].returncode, f"; see {log}" if first else "", partial(print, file=sys.stderr)
    if fault := ranks[first].fault():
        _, cause, trace = fault
        if first == 0:
            sys.stderr.write(trace)
        say(f"Rank {first} of {len(ranks)} failed with {cause}; the run was stopped{see}.")
        return 1
    if -code in signals:
        say(f"Stopped by {signal.Signals(-code).name}.")
    elif code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        name = signal.Signals(-code).name
        say(f"Rank {first} of {len(ranks)} was killed by {name}{memory}; the run was stopped{see}.")
    elif first and not signals and ranks[0].returncode != code:  # the first rank prints its own message otherwise
        ended = f"Rank {first} of {len(ranks)} ended with exit code {code}; the run was stopped{see}."
        say(_last_line(log) if code == 2 else ended)
    return code if code > 0 else 128 - code


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"{log} is empty."


@contextmanager
def requeued(wanted: bool) -> Iterator[None]:
    """Ask SLURM to run this job again if `wanted` and a signal ends the block.

    Only the first rank asks, or the process that has started the ranks or the jobs of a sweep.
    """
    try:
        yield
    except SystemExit as stop:
        if wanted and stop.code == PREEMPTED and is_first() and not _held:
            print(slurm.requeue(), file=sys.stderr, flush=True)
        raise


@contextmanager
def passed_on(children: Sequence[Child]) -> Iterator[list[int]]:
    """Pass signals on to the children and wait for them. Yield the list of signals that have come."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in list(children):
            if child.poll() is None:
                child.send_signal(number)

    before = take_signals(pass_on)
    try:
        yield received
    finally:
        give_back(before)
