"""What a user types, made into Hydra's overrides; and what to type where Hydra cannot read it."""

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from icl_msr.core.config import OWNED

_HOME = re.compile(r"(?<=[=,\[\s\"'])~(?=/)")
"""A tilde that begins a path: a shell expands none after `key=`."""


def overrides(typed: Sequence[str]) -> list[str]:
    """Return Hydra's words for the user's: short forms in full, `~/` as the home folder, flags before keys."""
    words = [part for word in typed for part in in_full(word)]
    return sorted(words, key=lambda word: word[:1] != "-" and "=" in word)  # Hydra reads no flag between overrides


def in_full(word: str) -> list[str]:
    """Return the overrides that a word is short for: two for `backbone=timm:NAME`, else one.

    An argument of the trainer may have a plus, whether our YAML lists it or not.
    """
    key, equals, value = word.partition("=")
    if equals:
        word = key + _HOME.sub(str(Path("~").expanduser()).replace("\\", r"\\"), equals + value)
    named = re.fullmatch(r"backbone=timm:(\S+)", word)
    if named:
        return ["backbone=timm", f"backbone.name={named[1]}"]
    argument = re.match(r"\+?trainer\.(\w+)=", word)
    added = argument and (word.startswith("+") or argument[1] in OWNED["trainer"])
    return [f"++{word.lstrip('+')}" if added else word]


def path_in(word: str) -> str:
    """Return the value of a word that we read ourselves, without the quotes that Hydra would need around it."""
    value = word.partition("=")[2]
    quoted = re.fullmatch(r"(['\"])(.*)\1", value)
    return quoted[2] if quoted else value


def unreadable(word: str) -> str:
    """Return the sentence about a word that is no override."""
    quoted = _quoted(word)
    advice = f", and put quotes around such a value: {quoted}" if quoted else ""
    return f"{word} cannot be read; write key=value{advice}."


def ambiguous(word: str) -> str:
    """Return the sentence about a word with several values in a command that is no sweep."""
    return (
        f"{word} has several values; add -m to run them one after the other, or put quotes around a value with a "
        f"comma: {_quoted(word)}."
    )


def _quoted(word: str) -> str:
    """Return the word with its value as text, for a shell; nothing where that is no override either."""
    key, equals, value = word.partition("=")
    text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    with suppress(HydraException):
        if equals and OverridesParser.create().parse_overrides([f"{key}={text}"])[0].value() == value:
            return f"{key}={shlex.quote(text)}"
    return ""
