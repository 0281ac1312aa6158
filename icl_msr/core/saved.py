"""Configs saved in folders. They are treated as data, because somebody else may have written the folder.

A config is read as plain YAML without aliases. Its `hydra` section is ignored. It may refer only to its own values, as
in `${seed}`. No environment variable is read and no resolver is called.
"""

import re
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from icl_msr.core.errors import UserError
from icl_msr.core.storage import read_regular, readable

LARGEST = 500_000
"""Largest size of a config in bytes."""
ADVICE = "restore it from a copy, or begin a new run in another folder"
"""Advice to the user if a config is damaged."""
DEEPEST = 40
"""Largest depth of nested mappings and lists."""

WRITTEN = {"cache": ".cache/icl-msr", "download": False}
"""Keys of a data set that make it write files, with the values that replace those of a config from a folder."""

_BEGIN, _END = "---\n", "...\n"
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def as_yaml(config: DictConfig) -> str:
    """Return a composed config as YAML. References to its own plain values are kept, all others are resolved.

    It has YAML's marks of begin and end, because half of a YAML file may be whole YAML.
    """
    raw, filled = (OmegaConf.to_container(config, resolve=resolve) for resolve in (False, True))
    return _BEGIN + OmegaConf.to_yaml(OmegaConf.create(_kept(raw, filled, raw))) + _END


def read(file: Path) -> dict[str, Any]:
    """Return a saved config, with references kept.

    Raises:
        UserError: it is damaged, too large, uses aliases, or refers to more than its own values.
        FileNotFoundError: it is not there.
    """
    with readable(file, ADVICE):
        text = read_regular(file, LARGEST).decode("utf-8-sig")
        _require_plain(text, file)
        content = OmegaConf.to_container(OmegaConf.load(StringIO(text)))
        if not isinstance(content, dict) or not content:
            raise ValueError("it does not hold a mapping")
    config = {str(key): value for key, value in content.items() if key != "hydra"}
    for key, value in leaves(config):
        if isinstance(value, str) and _asks_for_more(value, config):
            raise UserError(
                f"{shown(f'{key}={value}')} in {file} asks for more than a plain value of this config, and a saved "
                "config is data; put the value in its place."
            )
    if text.startswith(_BEGIN) and not text.endswith(_END):
        raise UserError(f"{file} is damaged (its end is missing); {ADVICE}.")
    dataset = config.get("dataset")
    if isinstance(dataset, dict):
        config["dataset"] = {**dataset, **{key: WRITTEN[key] for key in WRITTEN if dataset.get(key)}}
    return config


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is neither a mapping nor a list, with its full key."""
    if isinstance(value, Mapping | list):
        for name, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(part, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown(text: object) -> str:
    """Return foreign text for use in a message: one line of limited length, without control characters."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return line if len(line) <= 200 else f"{line[:200]}..."


def _require_plain(text: str, file: Path) -> None:
    """Check a text, before it is loaded, for aliases, which expand few bytes into many, and for deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{file} uses YAML aliases, as *{shown(event.anchor)}; write them out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise UserError(f"{file} nests more than {DEEPEST} mappings or lists, and no saved config does.")


def _asks_for_more(text: str, config: Any) -> bool:
    """Return whether a text refers to anything but plain values of the config, such as resolvers."""
    if "${" in _REFERENCE.sub("", text):
        return True
    values = [_value(match[1].split("."), config) for match in _REFERENCE.finditer(text)]
    return any(isinstance(value, Mapping | list) or (isinstance(value, str) and "${" in value) for value in values)


def _value(path: list[str], config: Any) -> Any:
    for name in path:
        if isinstance(config, list) and name.isdecimal() and int(name) < len(config):
            config = config[int(name)]
        else:
            config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _kept(raw: Any, filled: Any, config: Any) -> Any:
    if isinstance(raw, Mapping):
        return {name: _kept(part, filled[name], config) for name, part in raw.items()}
    if isinstance(raw, list):
        return [_kept(part, there, config) for part, there in zip(raw, filled, strict=True)]
    return filled if isinstance(raw, str) and _asks_for_more(raw, config) else raw
