"""Exceptions and exit codes that are meant for the user."""

PREEMPTED = 75
"""Exit code of a run that saved itself and should be started again: EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """A mistake the user can mend; the message is one sentence that says what to type instead."""
