"""What `python -m icl_msr.evaluate` is asked for: an encoder, a data set, evaluations, and where the results go."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from icl_msr.cli.command import sentence
from icl_msr.core.compose import compose
from icl_msr.core.config import Settings, check, config_dir, suggestion
from icl_msr.core.errors import UserError
from icl_msr.evaluation.subject import SOURCES, Subject, find

OWN = (*SOURCES, "weights", "to", "cache")
COMPOSED = ("dataset", "evaluation", "hardware", "seed")
"""What may be changed of the config that `icl_msr.run` composes."""
CACHE = ".cache/icl-msr/features"


@dataclass
class Order:
    """A command, read and checked."""

    subject: Subject
    settings: list[Settings]
    """One for each evaluation; they differ in nothing else."""
    evaluations: list[str]
    choices: dict[str, str]
    """Of the groups `dataset` and `evaluation`."""
    own_data: bool
    """Whether the data set is the run's own."""
    to: Path
    cache: Path | None


def read(words: Sequence[str]) -> Order:
    """What a command line asks for; nothing is built but an encoder that lies in a file.

    Raises:
        UserError: a word is no key, a value is not allowed, or there is no such encoder.
    """
    own: dict[str, str] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        group = key.lstrip("+~").partition(".")[0]
        if not equals and not word.startswith("~"):
            raise UserError(f"{word} is no key=value; the encoder is given as run=FOLDER or encoder=timm:NAME.")
        if key in own:
            raise UserError(f"{key} is given twice; keep one.")
        if key in OWN:
            own[key] = value
        elif group in COMPOSED or key == "hydra.searchpath":
            overrides.append(word)
        else:
            known = [*OWN, *COMPOSED]
            raise UserError(f"{key} is not a key of an evaluation; {suggestion(key, known)}")
    sources = [key for key in SOURCES if key in own]
    if len(sources) != 1:
        given = f"{' and '.join(sources)} are given" if sources else "Nothing is given to evaluate"
        raise UserError(f"{given}; give one of run=FOLDER, checkpoint=FILE, encoder=timm:NAME|torchvision:NAME|FILE.")
    if "weights" in own and ":" not in own.get("encoder", ""):
        raise UserError("weights is for encoder=timm:NAME and encoder=torchvision:NAME alone; leave it out.")
    subject = find(sources[0], own[sources[0]], own.get("weights"))
    composed, evaluations, choices, own_data = configs(subject, overrides)
    settings = [check(config) for config in composed]
    stamp = datetime.now().astimezone()
    name = re.sub(r"[^\w.-]+", "-", subject.name)
    default = f"runs/{stamp:%Y-%m-%d}/{stamp:%H-%M-%S}-evaluate-{name}"
    to, cache = Path(own.get("to", default)), own.get("cache", CACHE)
    if (to / "results.json").exists() or (to / "config.yaml").exists():
        raise UserError(f"{to} holds results or a run already; choose another folder, to=FOLDER.")
    return Order(subject, settings, evaluations, choices, own_data, to, None if cache in ("", "null") else Path(cache))


def configs(subject: Subject, overrides: Sequence[str]) -> tuple[list[DictConfig], list[str], dict[str, str], bool]:
    """One composed config for each evaluation, their names, the choices of the two groups, and whether the data set is
    that of the run.

    Raises:
        UserError: they cannot be composed.
    """
    picked = {"dataset": "confounded", "evaluation": "default"}
    picked |= {key: value for key, _, value in (word.partition("=") for word in overrides) if key in picked}
    names = re.split(r"\s*,\s*", picked["evaluation"].strip("[] "))
    own_data = subject.config is not None and not any(word.startswith("dataset=") for word in overrides)
    keys = [word for word in overrides if re.match(r"[+~]*evaluation\.", word)]
    changes = [word for word in overrides if own_data and re.match(r"\+*dataset\.", word)]
    common = [word for word in overrides if word not in [*keys, *changes] and not word.startswith("evaluation=")]
    common.insert(0, "hardware.precision=32-true")  # unless asked for: features are kept, and compared
    if subject.config is not None:
        common.insert(0, f"seed={subject.config['seed']}")
    try:
        nodes = {name: compose([*common, f"evaluation={name}"]).evaluation for name in names}
        composed = []
        for name in names:
            # A key is for those evaluations that have it; one that none has is refused by the last.
            has = {word: [other for other in names if _has(nodes[other], word)] or names[-1:] for word in keys}
            fitting = [word for word in keys if name in has[word]]
            config = compose([*common, f"evaluation={name}", *fitting])
            if own_data:
                assert subject.config is not None
                config.dataset = _with_new_keys(subject.config["dataset"], (subject.choices or {}).get("dataset"))
            for change in OverridesParser.create().parse_overrides(changes):
                OmegaConf.update(config, change.key_or_group, change.value(), force_add=True)
            composed.append(config)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as mistake:
        raise UserError(sentence(mistake, overrides)) from None
    if own_data and subject.choices:
        picked["dataset"] = subject.choices["dataset"]
    return composed, names, {**picked, "evaluation": "+".join(names)}, own_data


def _with_new_keys(saved: Any, choice: str | None) -> DictConfig:
    """The data set of a run, with the values of today's YAML file for keys that there were not when it was trained."""
    node: DictConfig = OmegaConf.create(saved)
    if choice and (config_dir() / "dataset" / f"{choice}.yaml").exists():
        today = compose([f"dataset={choice}"]).dataset
        if today.get("_target_") == node.get("_target_"):
            return OmegaConf.merge(today, node)  # type: ignore[return-value]
    return node


def _has(node: DictConfig, word: str) -> bool:
    return word.partition("=")[0].split(".")[1] in node.keys()  # noqa: SIM118  "in node" leaves out what is still ???
