"""The terminal of a command: its arguments, its text, and one sentence for a mistake."""

import io
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from icl_msr.core.errors import SharedMistake, UserError
from icl_msr.core.memory import SHORT, memory_is_short
from icl_msr.core.ranks import is_first
from icl_msr.core.signals import stoppable

if TYPE_CHECKING:  # a help text does not need it
    from rich.console import Console
    from rich.progress import Progress

Words = ParamSpec("Words")


class Arguments(ArgumentParser):
    """An argument parser that raises a mistake as a `UserError` instead of printing a block of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the sentence about a mistake in the arguments."""
        said = message.removeprefix("argument ")
        raise UserError(f"{said[:1].upper()}{said[1:]}; {self.prog} --help says what is allowed.")


def answering(main: Callable[Words, int]) -> Callable[Words, int]:
    """Decorate a command's main function, so that a mistake ends in one sentence and the exit code 2.

    A signal such as Ctrl-C ends in one sentence and the exit code 75. The command goes on when its output is no longer
    read.
    """

    @wraps(main)
    def answered(*arguments: Words.args, **keys: Words.kwargs) -> int:
        outlive_reader()
        try:
            with stoppable():
                return main(*arguments, **keys)
        except UserError as mistake:
            if is_first() or not isinstance(mistake, SharedMistake):
                complain(str(mistake))
            return 2
        except Exception as fault:
            if (sentence := about_the_machine(fault)) is None:
                raise
            complain(sentence)
            return 2

    return answered


def about_the_machine(fault: Exception) -> str | None:
    """Return the sentence about an error that is not of the program: no memory, or a path that cannot be used."""
    if memory_is_short(fault):
        return SHORT
    if isinstance(fault, OSError) and fault.filename is not None:
        return f"{os.fsdecode(fault.filename)} cannot be used ({fault.strerror}); give another path."
    return None


def complain(message: str) -> None:
    """Print a message to standard error as one line. Control characters are escaped, because names may hold them."""
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in message), file=sys.stderr)


def plain_console(**keys: Any) -> "Console":
    """Return a console that prints text as it is: names of folders and classes may look like rich's markup."""
    from rich.console import Console

    return Console(**{"highlight": False, "soft_wrap": True, "markup": False, "emoji": False, **keys})


def progress_bar(*columns: Any, shown: bool = True) -> "Progress":
    """Return rich's progress bar on standard error. In a file, where it would leave blank lines, it is not shown."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


class _Outlet(io.FileIO):
    """An output file that discards what cannot be written, as after `| head` or on a full disk."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # processes that we start inherit it
            os.close(nowhere)
        except OSError:
            pass
        return len(data)


def outlive_reader() -> None:
    """Let the command go on when its output is no longer read, or cannot be shown in the terminal's encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # not a replacement, which has no pipe
            stream.flush()
            outlet = _Outlet(stream.fileno(), "wb", closefd=False)
            text = io.TextIOWrapper(io.BufferedWriter(outlet), stream.encoding, "backslashreplace")
            text.reconfigure(line_buffering=stream.line_buffering, write_through=stream.write_through)
            setattr(sys, name, text)
