"""What `python -m icl_msr.evaluate` is asked for: an encoder, a data set, evaluations, and where the results go."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from icl_msr.checkpoint import load_encoder
from icl_msr.command import sentence
from icl_msr.config import Settings, check, config_dir, suggestion
from icl_msr.encoders import Backbone
from icl_msr.errors import UserError
from icl_msr.evaluation import foreign
from icl_msr.folder import RunFolder

SOURCES = ("run", "checkpoint", "encoder")
OWN = (*SOURCES, "weights", "to", "cache")
COMPOSED = ("dataset", "evaluation", "hardware", "seed")
"""What may be changed of the config that `icl_msr.run` composes."""
CACHE = ".cache/icl-msr/features"


@dataclass
class Subject:
    """What is evaluated, and what is known of it before the data set is."""

    name: str
    source: str
    build: Callable[[int, int], Backbone]
    """The encoder for images of so many pixels; its random weights, if it has any, depend on the seed."""
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int | None = None
    """What it was trained with or is meant for, in pixels, if known."""
    config: Mapping[str, Any] | None = None
    """That of the run which trained it."""
    recorded: Mapping[str, Any] | None = None
    """The same with interpolations, so that runs which differ in their seed differ in nothing that follows it."""
    choices: Mapping[str, str] | None = None
    """Those of the run."""
    checkpoint: str | None = None
    """The file's name, where one was asked for: another one of the run is another encoder."""
    random: bool = False
    """Whether its weights are random, so that there is no untrained one to compare it with."""

    def fitting(self, image_size: int, seed: int) -> Backbone:
        """The encoder, through which two images of so many pixels have gone.

        Raises:
            UserError: they do not go through.
        """
        encoder = self.build(image_size, seed).to(memory_format=torch.channels_last).eval()
        try:
            with torch.inference_mode():
                encoder(torch.zeros(2, 3, image_size, image_size))
        except Exception as error:
            size = f"={self.image_size}" if self.image_size else ""
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"{self.name} cannot take images of {image_size} pixels ({reason}); set dataset.image_size{size}."
            ) from None
        return encoder


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


def find(source: str, value: str, weights: str | None) -> Subject:
    """The encoder that is asked for.

    Raises:
        UserError: there is none.
    """
    if source == "encoder" and (named := re.fullmatch(r"(\w+):(.*)", value)):
        library, name = named.groups()
        if library not in foreign.LIBRARIES:
            raise UserError(f"encoder={value} is of an unknown library; {suggestion(library, foreign.LIBRARIES)}")
        foreign.require_known(library, name)
        chosen = None if weights == "null" else weights or library

        def made(image_size: int, seed: int) -> Backbone:
            return foreign.foreign_encoder(library, name, image_size, chosen, seed)

        mean, std = foreign.statistics_of(library, name)
        said = f"{value}, weights={chosen or 'null'}"
        size = foreign.image_size_of(library, name) if chosen == library else None
        return Subject(f"{library}:{name}", said, made, mean, std, size, random=chosen is None)
    if source == "encoder":
        if not Path(value).exists():
            raise UserError(f"There is no encoder {value}; give a .safetensors file, timm:NAME or torchvision:NAME.")
        backbone, about = load_encoder(Path(value))
        path = Path(value)
        name = path.absolute().parent.name if path.stem == "encoder" else path.stem
        return _exported(backbone, about, name, value)
    file = Path(value)
    run = RunFolder(file if source == "run" else file.absolute().parent.parent)
    if source == "checkpoint":
        if not file.is_file():
            raise UserError(f"There is no checkpoint {file}; give a run's checkpoints/last.ckpt.")
        run.checkpoint = file
    elif not run.path.is_dir():
        raise UserError(f"There is no run {run}; give the folder of a run.")
    if not run.checkpoint.exists() and run.done:
        backbone, about = load_encoder(run.path)
    else:
        from icl_msr.export import rebuild  # what only a run needs: its method

        backbone, about = rebuild(run, "online")
    subject = _exported(backbone, about, run.path.resolve().name, value)
    subject.config, subject.recorded = run.saved_config(), run.saved_config(resolve=False)
    subject.checkpoint = file.name if source == "checkpoint" else None
    with suppress(OSError, ValueError):
        subject.name = run.facts().get("name", subject.name)
    return subject


def _exported(backbone: Backbone, about: Mapping[str, Any], name: str, source: str) -> Subject:
    try:
        mean, std, size = about["mean"], about["std"], int(about["image_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{source} does not say what images the encoder takes; export it from its run again.") from None
    return Subject(name, source, lambda *_: backbone, mean, std, size, choices=about.get("choices"))


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
        nodes = {name: _compose([*common, f"evaluation={name}"]).evaluation for name in names}
        composed = []
        for name in names:
            # A key is for those evaluations that have it; one that none has is refused by the last.
            has = {word: [other for other in names if _has(nodes[other], word)] or names[-1:] for word in keys}
            fitting = [word for word in keys if name in has[word]]
            config = _compose([*common, f"evaluation={name}", *fitting])
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
        today = _compose([f"dataset={choice}"]).dataset
        if today.get("_target_") == node.get("_target_"):
            return OmegaConf.merge(today, node)  # type: ignore[return-value]
    return node


def _has(node: DictConfig, word: str) -> bool:
    return word.partition("=")[0].split(".")[1] in node.keys()  # noqa: SIM118  "in node" leaves out what is still ???


def _compose(overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))
