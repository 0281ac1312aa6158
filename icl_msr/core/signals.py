"""Signals that end a command."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from icl_msr.core.errors import PREEMPTED
from icl_msr.core.ranks import is_first

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, a closed terminal, and the signals that a scheduler sends before it takes a machine away."""

Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """Raised by a signal at any point of the program."""


def again(cause: str) -> str:
    """Return the message of a command that was stopped before it kept anything."""
    return f"Stopped by {cause}; the same command begins again."


@contextmanager
def stoppable(farewell: Callable[[str], str] = again) -> Iterator[None]:
    """End a command on a signal with one sentence and exit code 75. During training, `Checkpoints` does the same.

    A second signal ends it at once. The same signal within a second does not count as a second one, because SLURM
    signals a rank and also its parent, and the parent passes the signal on.

    Args:
        farewell: maps the name of the signal to the sentence.
    """
    came: list[tuple[int, float]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append((number, time.monotonic()))
        (first, when), (_, now) = came[0], came[-1]
        if len(came) == 1:
            raise Stopped(PREEMPTED)
        if number != first or now - when > 1.0:
            sys.exit(128 + number)

    before = take_signals(stop)
    try:
        yield
    except Stopped:
        if came and is_first():
            print(farewell(signal.Signals(came[0][0]).name), file=sys.stderr, flush=True)
        raise
    finally:
        give_back(before)


def take_signals(handler: Handler) -> dict[signal.Signals, Any]:
    """Let a function answer the signals, and return what answered them before. `nohup` keeps its effect."""
    if threading.current_thread() is not threading.main_thread():  # Python allows it there only
        return {}
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    taken = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in taken}


def give_back(before: dict[signal.Signals, Any]) -> None:
    """Restore what `take_signals` returned."""
    for number, handler in before.items():
        signal.signal(number, handler)
