"""What every drawing needs of text."""


def plain(text: str) -> str:
    """Write text so that matplotlib draws it as it is: dollars would be mathematics, and legends leave `_names` out."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")
