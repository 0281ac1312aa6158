"""The encoder to evaluate, from a run, a checkpoint, a file or another library."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icl_msr.core import trust
from icl_msr.core.config import build, suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.methods import Method
from icl_msr.models import foreign
from icl_msr.models.backbones import Backbone
from icl_msr.models.checkpoint import read_checkpoint
from icl_msr.models.exported import load_encoder

SOURCES = ("run", "checkpoint", "encoder")
ENCODERS = {"online": "method.backbone.", "momentum": "method.momentum_encoder.backbone."}
"""Prefixes of the encoders' weights in a checkpoint."""


@dataclass
class Subject:
    """An encoder to evaluate, with everything known about it."""

    name: str
    source: str
    build: Callable[[int, int], Backbone]
    """Maps (image size in pixels, seed) to the encoder. The seed decides random weights, if there are any."""
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int | None = None
    """Image size in pixels that it was trained with or is meant for, if known."""
    config: Mapping[str, Any] | None = None
    """Config of the run that trained it."""
    recorded: Mapping[str, Any] | None = None
    """The same config with interpolations, so that values which follow from the seed are equal in all seeds."""
    choices: Mapping[str, str] | None = None
    """Choices of the run's config groups."""
    checkpoint: str | None = None
    """Name of the checkpoint file, if the user named one. Other checkpoints of the run are other encoders."""
    random: bool = False
    """True if its weights are random, so that there is no untrained encoder to compare it with."""

    def fitting(self, image_size: int, seed: int) -> Backbone:
        """Build the encoder and check that it takes images of `image_size` pixels.

        Raises:
            UserError: it cannot take them.
        """
        encoder = self.build(image_size, seed).to(memory_format=torch.channels_last).eval()
        encoder.require_size(image_size, f"set dataset.image_size{f'={self.image_size}' if self.image_size else ''}")
        return encoder


def find(source: str, value: str, weights: str | None) -> Subject:
    """Find the encoder that the user names.

    Args:
        source: one of `SOURCES`.
        value: a folder, a file, or a name such as timm:NAME.
        weights: name of the weights of a library's model; "null" for random ones, None for the library's own.

    Raises:
        UserError: it does not exist, or cannot be loaded.
    """
    if source == "encoder" and (named := re.fullmatch(r"(\w+):(.*)", value)):
        library, name = named.groups()
        if library not in foreign.LIBRARIES:
            raise UserError(f"encoder={value} names an unknown library; {suggestion(library, foreign.LIBRARIES)}")
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
        if Path(value).is_file() and Path(value).suffix not in (".safetensors", ".json"):
            raise UserError(_of_another_program(value))
        backbone, about = load_encoder(Path(value))
        path = Path(value)
        name = path.absolute().parent.name if path.stem == "encoder" else path.stem
        return _exported(backbone, about, name, value)
    file = Path(value)
    run = RunFolder(file if source == "run" else file.absolute().parent.parent)
    if source == "checkpoint":
        if not file.is_file():
            raise UserError(f"There is no checkpoint {file}; give a run's checkpoints/last.ckpt.")
        if not run.begun:
            raise UserError(_of_another_program(value))
        run.checkpoint = file
    elif not run.path.is_dir():
        raise UserError(f"There is no run {run}; give the folder of a run.")
    if run.begun:
        run.require_format()
    if not run.checkpoint.exists() and run.done:
        backbone, about = load_encoder(run.path)
    else:
        backbone, about = rebuild(run, "online")
    subject = _exported(backbone, about, run.path.resolve().name, value)
    subject.config, subject.recorded = run.saved_config(), run.saved_config(resolve=False)
    subject.checkpoint = file.name if source == "checkpoint" else None
    subject.name = run.facts().get("name", subject.name)
    return subject


def _of_another_program(file: str) -> str:
    return (
        f"{file} lies in no run's folder, so it is of another program and does not say its network; name that: "
        f"encoder=torchvision:resnet50 weights={file}, or encoder=timm:NAME."
    )


def _exported(backbone: Backbone, about: Mapping[str, Any], name: str, source: str) -> Subject:
    try:
        mean, std, size = about["mean"], about["std"], int(about["image_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{source} does not say what images the encoder takes; export it from its run again.") from None
    return Subject(name, source, lambda *_: backbone, mean, std, size, choices=about.get("choices"))


def rebuild(run: RunFolder, encoder: str) -> tuple[Backbone, dict[str, Any]]:
    """Rebuild an encoder from a run's last checkpoint; return it with the content of its encoder.json.

    Raises:
        UserError: there is no such run, checkpoint or encoder, or they do not fit together.
    """
    if not run.begun:
        raise UserError(f"{run} is not a run: it has no config.yaml; give the folder of a run that has begun to train.")
    run.require_format()
    saved = read_checkpoint(run.checkpoint)["state_dict"]
    prefix = ENCODERS[encoder]
    state = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    if not state:
        raise UserError(f"The method of {run} has no {encoder} encoder; type --encoder online.")
    try:
        facts = run.facts()
        about = {**facts["images"], "choices": facts["choices"], "icl_msr": facts["icl_msr"], "encoder": encoder}
    except KeyError:
        raise UserError(f"{run.environment} does not say what images the encoder takes; repeat the run.") from None
    try:
        config, images = run.saved_config(), facts["images"]
        trust.require(config, run.config, ("backbone", "method"))
        node: Mapping[str, Any] = config["backbone"]
        untrained = {**node, "weights": None} if "weights" in node else node
        plain: Backbone = build(untrained, image_size=images["image_size"])
        # The method may change the encoder. The number of classes does not affect any encoder.
        facts_of_data = {"classes": 2, "mean": images["mean"], "std": images["std"]}
        method: Method = build(config["method"], backbone=plain, **facts_of_data)
        backbone = method.backbone
        backbone.load_state_dict(state)
        backbone.require_size(int(images["image_size"]), f"restore {run.environment}")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".: ")
        raise UserError(
            f"The encoder cannot be rebuilt from {run.config} ({reason}); restore the config or the package that the "
            "run was trained with."
        ) from error
    return backbone, about
