"""Timing for all benchmarks. Rounds alternate in one process, so that a busy machine slows all pieces alike."""

import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

Work = Mapping[str, Callable[[], object]]


def alternate(
    work: Work, *, rounds: int, limit: float = 60.0, device: torch.device | None = None, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of each piece of work, one value per round.

    Args:
        work: the calls to time, by name.
        rounds: largest number of rounds.
        limit: seconds after which no further round begins. There is always one round.
        device: the device that the work runs on. A GPU is waited for.
        warm_up: whether there is a first round that is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    began = time.perf_counter()
    for round_ in range(0 if warm_up else 1, rounds + 1):
        if round_ > 1 and time.perf_counter() - began > limit:
            break
        for name, call in work.items():
            taken = stopwatch(call, device)
            if round_:
                seconds[name].append(taken)
    return seconds


def stopwatch(call: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object]) -> float | None:
    """Return the megabytes that a call adds to this process at its peak; None where the system cannot tell."""
    try:
        gc.collect()
        with suppress(AttributeError):  # libraries of C other than glibc
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(kind: str) -> float:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
