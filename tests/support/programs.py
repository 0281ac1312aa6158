"""Run the program as a user does, in real processes. No process may outlive its test."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from icl_msr.cli.processes import clean_environment

Answer = TypeVar("Answer")

LIMIT = 600.0
"""Longest wait of a test, in seconds. The machine may be busy."""


@dataclass
class Program:
    """A command that is running or has ended."""

    process: "subprocess.Popen[bytes]"
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def wait(self, seconds: float = LIMIT) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


class Programs:
    """Starts commands, finds all of their processes by a mark in the environment, and ends them."""

    def __init__(self, folder: Path):
        self.folder, self.mark, self.count = folder, secrets.token_hex(8), 0

    def start(self, *words: str, module: str = "icl_msr.run", out: int | None = None, **environment: str) -> Program:
        """Start `python -m <module> <words>`. Its output goes to a file, or to the descriptor `out`."""
        self.count += 1
        where = self.folder / f"program-{self.count}"
        where.mkdir(parents=True)
        ours = {**clean_environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PROGRAMS": self.mark}
        with (where / "out").open("wb") as file, (where / "err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env={**ours, **environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file if out is None else out,
                stderr=err,
                start_new_session=True,
            )
        return Program(process, where)

    def __call__(self, *words: str, **environment: str) -> Program:
        """Start a command and wait for its end."""
        program = self.start(*words, **environment)
        program.wait()
        return program

    def alive(self) -> dict[int, dict[str, str]]:
        """Return the environments of all running processes of these commands, by process number."""
        found: dict[int, dict[str, str]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and entry.name != str(os.getpid()):
                try:
                    content = (entry / "environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                variables = dict(pair.partition("=")[::2] for pair in content.split("\0"))
                if variables.get("PROGRAMS") == self.mark:
                    found[int(entry.name)] = variables
        return found

    def rank(self, number: int) -> int:
        """Wait for a rank to start, and return its process number."""

        def look() -> int | None:
            return next((pid for pid, known in self.alive().items() if known.get("RANK") == str(number)), None)

        return until(look)

    def gone(self, seconds: float = LIMIT) -> float:
        """Wait until no process is left, and return the time that it took, in seconds."""
        began = time.monotonic()
        until(lambda: not self.alive(), seconds)
        return time.monotonic() - began

    def close(self) -> None:
        """End the processes that are left, by their numbers.

        Raises:
            AssertionError: a process was left.
        """
        left = self.alive()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"{len(left)} processes were left behind"


def until(look: Callable[[], Answer | None], seconds: float = LIMIT) -> Answer:
    """Call `look` until its answer is true, and return this answer."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


def steps(folder: Path) -> int:
    """Return the number of optimiser steps that a run has logged so far."""
    file = folder / "metrics.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else 0


def slurm_batch(tasks: int) -> Mapping[str, str]:
    """Return the variables that SLURM sets for a batch script of several tasks, although the script is one process."""
    numbers = {
        "JOB_ID": 1,
        "NTASKS": tasks,
        "NTASKS_PER_NODE": tasks,
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
        "NNODES": 1,
    }
    return {
        **{f"SLURM_{name}": str(value) for name, value in numbers.items()},
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
    }


def same(one: Any, other: Any, where: str = "") -> None:
    """Check that two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}/{i}")
    else:
        assert one == other, where
