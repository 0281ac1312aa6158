"""The arguments of `python -m icl_msr.evaluate`: an encoder, a data set, evaluations and an output folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from icl_msr.cli.command import sentence
from icl_msr.cli.words import in_full, path_in, spelled_out
from icl_msr.core import trust
from icl_msr.core.compose import compose
from icl_msr.core.config import Settings, check, config_dir, suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import require_local
from icl_msr.evaluation.subject import SOURCES, Subject, find

OWN = (*SOURCES, "weights", "to", "cache")
COMPOSED = ("dataset", "evaluation", "hardware", "seed")
"""The keys of the config of `icl_msr.run` that an evaluation may change."""
CACHE = ".cache/icl-msr/features"


@dataclass
class Order:
    """The parsed and checked arguments of an evaluation."""

    subject: Subject
    settings: Settings
    choices: dict[str, str]
    """The choices of the groups `dataset` and `evaluation`."""
    own_data: bool
    """True if the data set is that of the run that trained the encoder."""
    to: Path
    cache: Path | None


def read(words: Sequence[str]) -> Order:
    """Read and check a command line. Only an encoder that lies in a file is built.

    Raises:
        UserError: a key is unknown, a value is not allowed, or the encoder does not exist.
    """
    own: dict[str, str] = {}
    overrides = []
    for word in (part for typed in words for part in in_full(typed)):
        key, equals, value = word.partition("=")
        group = key.lstrip("+~").partition(".")[0]
        if not equals and not word.startswith("~"):
            raise UserError(
                f"{word} is not of the form key=value; the encoder is given as run=FOLDER or encoder=timm:NAME."
            )
        if key in own:
            raise UserError(f"{key} is given twice; keep one.")
        if key == "evaluation" and "," in value and value[:1] != "[":
            word = f"evaluation=[{value}]"  # an evaluation is not a sweep, so a list is not split
        if key in OWN:
            own[key] = path_in(word)
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
        raise UserError("weights is only for encoder=timm:NAME and encoder=torchvision:NAME; leave it out.")
    subject = find(sources[0], own[sources[0]], own.get("weights"))
    config, choices, own_data = composed(subject, overrides)
    settings = check(config)
    if not settings.evaluation:
        others = (path.stem for path in (config_dir() / "evaluation").glob("*.yaml") if path.stem != "none")
        raise UserError(f"evaluation=none measures nothing; leave it out, or {suggestion('', others)}")
    stamp = datetime.now().astimezone()
    name = re.sub(r"[^\w.-]+", "-", subject.name)
    default = f"runs/{stamp:%Y-%m-%d}/{stamp:%H-%M-%S}-evaluate-{name}"
    for key in ("to", "cache"):
        require_local(own.get(key, ""), key)
    to, cache = Path(own.get("to", default)), own.get("cache", CACHE)
    there = RunFolder(to)
    if there.done or there.metrics.exists() or there.checkpoint.exists():  # a stopped evaluation has none of them
        raise UserError(f"{to} holds results or a run already; choose another folder, to=FOLDER.")
    return Order(subject, settings, choices, own_data, to, None if cache in ("", "null") else Path(cache))


def composed(subject: Subject, overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str], bool]:
    """Return the config, the choices of `dataset` and `evaluation`, and whether the data set is that of the run.

    Raises:
        UserError: the config cannot be composed.
    """
    own_data = subject.config is not None and not any(word.startswith("dataset=") for word in overrides)
    changes = [word for word in overrides if own_data and re.match(r"\+*dataset\.", word)]
    words = ["hardware.precision=32-true"]  # the default, because features are stored and compared
    if subject.config is not None:
        seed = subject.config.get("seed")
        if type(seed) is not int:
            raise UserError(f"The config of {subject.source} has no seed that is a whole number; restore it.")
        words.append(f"seed={seed}")
        if own_data:
            trust.require(subject.config, Path(subject.source), ["dataset"])
    words += [word for word in overrides if word not in changes]
    try:
        config = compose(spelled_out(words))
        if own_data:
            assert subject.config is not None
            config.dataset = subject.config["dataset"]
        for change in OverridesParser.create().parse_overrides(changes):
            OmegaConf.update(config, change.key_or_group, change.value(), force_add=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as mistake:
        raise UserError(sentence(mistake, overrides)) from None
    dataset = next((word.partition("=")[2] for word in overrides if word.startswith("dataset=")), "confounded")
    if own_data and subject.choices:
        dataset = subject.choices["dataset"]
    return config, {"dataset": dataset, "evaluation": "+".join(config.evaluation)}, own_data
