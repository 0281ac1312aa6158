"""Stop the jobs of somebody else's launcher, which kills jobs when its command ends and passes no signal on."""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from icl_msr.cli.processes import Child
from icl_msr.core.errors import PREEMPTED
from icl_msr.core.signals import take_signals
from icl_msr.core.storage import atomic_write

FAREWELL = "The sweep was stopped; the same command continues it."

PAUSE = 0.2
"""Seconds between two looks for the file."""


class Stop:
    """The file `stop` in a sweep's folder: the number of the signal that has stopped the command.

    The command writes it, and the processes that run its jobs look for it, on other machines too.
    """

    def __init__(self, sweep: Path):
        self.path = sweep / "stop"

    def signal(self) -> int | None:
        """Return the number of the signal; None if the command goes on."""
        with suppress(OSError, ValueError):
            return int(self.path.read_text())
        return None

    def forget(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def answer_signals(self) -> None:
        """Write the file on a signal, from now on. A second signal ends the command at once.

        The same signal within a second does not count as a second one; see `core.signals.stoppable`.
        """
        came: list[tuple[int, float]] = []

        def request(number: int, frame: FrameType | None) -> None:
            came.append((number, time.monotonic()))
            (first, when), (_, now) = came[0], came[-1]
            if len(came) == 1:
                atomic_write(self.path, str(int(number)))
            elif number != first or now - when > 1.0:
                self.forget()
                sys.exit(128 + number)

        take_signals(request)
        _stops.append(self)

    @contextmanager
    def passed_on(self, children: Sequence[Child], received: Sequence[int]) -> Iterator[None]:
        """Pass the signal on to the children inside the context, unless this process has received it too."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(PAUSE):
                number = self.signal()
                if number is not None and (children or received):
                    for child in [] if received else list(children):
                        if child.poll() is None:
                            child.send_signal(signal.Signals(number))
                    return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()


_stops: list[Stop] = []


def leave_if_stopped() -> None:
    """End this command with one sentence and exit code 75 if a signal has come and its jobs have ended."""
    for stop in _stops:
        if stop.signal() is not None:
            stop.forget()
            print(FAREWELL, file=sys.stderr, flush=True)
            sys.exit(PREEMPTED)
