"""Text in figures."""


def plain(text: str) -> str:
    """Return text that matplotlib draws literally: a dollar would start mathematics, and legends skip `_names`."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")
