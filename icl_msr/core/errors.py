"""Exceptions and exit codes that are meant for the user."""

PREEMPTED = 75
"""Exit code of a run that saved itself and should be started again: EX_TEMPFAIL of sysexits.h."""


def reason(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    said = str(error).strip().splitlines()
    return said[0].rstrip(". ") if said else type(error).__name__


class UserError(Exception):
    """A mistake that the user can fix. The message is one sentence that says what to type instead."""


class SharedMistake(UserError):
    """A mistake that every rank sees, such as a wrong number of ranks. Only the first rank prints it."""
