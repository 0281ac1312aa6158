"""The one exception that is meant for the user's eyes."""


class UserError(Exception):
    """A mistake the user can mend; the message is one sentence that says what to type instead."""
