"""Turn what a user types into Hydra's overrides, and say what to type where Hydra cannot read it."""

import re
import shlex
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from icl_msr.core.compose import compose
from icl_msr.core.config import OWNED, PLURAL, config_dir, no_keys
from icl_msr.core.errors import UserError

_KEY = re.compile(r"(?P<sign>[+~]*)(?P<group>\w+)\.(?P<name>[^.=]+)(?P<rest>.*)", re.DOTALL)
_HOME = re.compile(r"(?<=[=,\[\s\"'])~(?=[/,\]\s\"']|$)")
"""A tilde that is or begins a path. A shell does not expand it after `key=`."""


def overrides(typed: Sequence[str]) -> list[str]:
    """Return Hydra's overrides for the typed words: short forms in full, `~/` as the home folder, flags first."""
    words = [part for word in typed for part in in_full(word)]
    # Hydra reads no flags between overrides. A word without an equals sign is the value of a flag or deletes a key.
    return sorted(words, key=lambda word: word[:1] == "~" or (word[:1] != "-" and "=" in word))


def in_full(word: str) -> list[str]:
    """Return the overrides that a word is short for: two for `backbone=timm:NAME`, else one.

    An argument of the trainer may have a plus, whether or not our YAML lists it.
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


def spelled_out(words: Sequence[str], search_path: Sequence[str] = ()) -> list[str]:
    """Return overrides in which every key of a plural group names the choices that have this key.

    `evaluation=[default,corruptions] evaluation.images=5` gives `evaluation.corruptions.images=5`. A word that names a
    choice, or a node that a plus adds, stays as it is. A key that no choice has goes to the last one, which refuses it.

    Raises:
        UserError: no choice could have a key, or several choices are given for a group that takes one.
        HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError: the other words cannot be composed.
    """
    for word in words:
        _require_one_choice(word)
    keys = [word for word in words if (found := _KEY.match(word)) and found["group"] in PLURAL]
    if not keys:
        return list(words)
    others = [word for word in words if word not in keys and ("=" in word or word[:1] == "~") and word[:1] != "-"]
    config = compose([*search_path, *others])
    added = {_key(word)[1:3] for word in keys if word[:1] == "+" and (word[:2] != "++" or _is_node(word))}
    return [part for word in words for part in (_for_those_with(word, config, added) if word in keys else [word])]


def _for_those_with(word: str, config: DictConfig, added: Collection[tuple[str, str]]) -> list[str]:
    sign, group, name, rest = _key(word)
    chosen: Any = OmegaConf.to_container(config[group])  # `in` on a DictConfig misses keys without a value
    having = [choice for choice, node in chosen.items() if name in (node or {})]
    named = name in chosen and (rest[:1] == "." or sign == "~")
    if named or (not having and (group, name) in added):
        if not chosen and not _is_node(word):
            raise UserError(no_keys(group, f"{group}.{name}"))
        return [word]
    if not chosen:
        raise UserError(no_keys(group, f"{group}.{name}"))
    if not having and rest[:1] == ".":  # the choice does not exist
        return [word]
    sign = "" if not having and sign == "++" else sign
    return [f"{sign}{group}.{choice}.{name}{rest}" for choice in having or [*chosen][-1:]]


def for_sweep(words: Sequence[str]) -> list[str]:
    """Return the words of a sweep with two pluses before keys of plural groups.

    Hydra reads these keys before it knows the jobs, whose choices may differ. The pluses let it accept the keys, and
    `spelled_out` assigns them to the choices of each job.
    """
    return [
        f"++{word}" if (found := _KEY.match(word)) and found["group"] in PLURAL and not found["sign"] else word
        for word in words
    ]


def _is_node(word: str) -> bool:
    """Return whether a word adds a whole node to a plural group, and not a key to its choices."""
    return _key(word)[3][:2] in ("={", "._")


def _key(word: str) -> tuple[str, str, str, str]:
    """Return the leading signs of a word, its group, the first name below the group, and the rest."""
    found = _KEY.match(word)
    assert found
    return found["sign"], found["group"], found["name"], found["rest"]


def _require_one_choice(word: str) -> None:
    group, _, value = word.partition("=")
    if value[:1] == "[" and group not in PLURAL and group.isidentifier() and (config_dir() / group).is_dir():
        raise UserError(
            f"{word} names several choices, and {group} takes one; write {group}=<name>, or "
            f"-m {group}={value[1:-1]} for a run with each."
        )


def in_short(word: str) -> str:
    """Return a word without the choice's name and the two pluses that `spelled_out` and `for_sweep` add."""
    return re.sub(rf"^(?:\+\+)?(\+?(?:{'|'.join(PLURAL)})\.)(?:[^.=]+\.)?", r"\1", word)


def path_in(word: str) -> str:
    """Return the value of a word that Hydra does not read, without the quotes that Hydra would need."""
    value = word.partition("=")[2]
    quoted = re.fullmatch(r"(['\"])(.*)\1", value)
    return quoted[2] if quoted else value


def unreadable(word: str) -> str:
    """Return the sentence about a word that is not an override."""
    quoted = _quoted(word)
    advice = f", and put quotes around such a value: {quoted}" if quoted else ""
    return f"{word} cannot be read; write key=value{advice}."


def ambiguous(word: str) -> str:
    """Return the sentence about a word with several values in a command that is not a sweep."""
    group, _, value = word.partition("=")
    if group in PLURAL:
        return f"{word} has several values; write {group}=[{value}] for a run with all, or add -m for a run with each."
    return (
        f"{word} has several values; add -m to run them one after the other, or put quotes around a value with a "
        f"comma: {_quoted(word)}."
    )


def _quoted(word: str) -> str:
    """Return the word with its value in quotes for a shell; an empty text if that is not an override either."""
    key, equals, value = word.partition("=")
    text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    with suppress(HydraException):
        if equals and OverridesParser.create().parse_overrides([f"{key}={text}"])[0].value() == value:
            return f"{key}={shlex.quote(text)}"
    return ""
