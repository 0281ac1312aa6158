"""Exceptions and exit codes that are meant for the user."""

PREEMPTED = 75
"""Exit code of a run that saved itself and should be started again: EX_TEMPFAIL of sysexits.h."""


def reason(error: BaseException) -> str:
    """Return the first line of what an error says, for the middle of a sentence."""
    said = str(error).strip().splitlines()
    return said[0].rstrip(". ") if said else type(error).__name__


class UserError(Exception):
    """A mistake the user can mend; the message is one sentence that says what to type instead."""
