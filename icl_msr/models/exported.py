"""Exported encoders: weights and a recipe, usable without this package."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save

from icl_msr.core.errors import UserError
from icl_msr.core.storage import atomic_write, read_json, readable
from icl_msr.models.backbones import Backbone, from_recipe, resnet, timm_model, tiny
from icl_msr.models.lab import half_encoder, lab_encoder

BUILDERS: dict[str, Callable[..., Backbone]] = {
    "tiny": tiny,
    "resnet": resnet,
    "timm_model": timm_model,
    "lab_encoder": lab_encoder,
    "half_encoder": half_encoder,
}
"""The only functions that a recipe in an encoder.json may name."""


def export_encoder(backbone: Backbone, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Write `encoder.safetensors` and `encoder.json` into a folder, and `encoder-<part>` of each part.

    The weights fit the plain torchvision or timm model that the Python code under `load` builds. `recipe` says the same
    to `load_encoder`.

    Args:
        backbone: the encoder.
        folder: an existing folder.
        facts: further plain data for `encoder.json` (data set, mean, standard deviation, image size, method, ...).

    Returns:
        The path of `encoder.safetensors`.
    """
    encoders = by_file(backbone)
    for name, encoder in encoders.items():
        path = folder / name
        atomic_write(path, weights(encoder))
        load = python_to_load(encoder, name)
        about = {"channels": encoder.channels, **facts, "recipe": encoder.recipe, "load": load}
        atomic_write(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    return folder / next(iter(encoders))


def by_file(backbone: Backbone) -> dict[str, Backbone]:
    """Return the exported encoders by the name of their weights file: the whole one first, then its parts."""
    parts = {f"encoder-{name}.safetensors": part for name, part in backbone.parts().items()}
    return {"encoder.safetensors": backbone, **parts}


def weights(backbone: Backbone) -> bytes:
    """Return the plain network's state dict as safetensors."""
    # safetensors keeps no strides, so weights in channels_last are made contiguous.
    return save({name: tensor.cpu().contiguous() for name, tensor in backbone.net.state_dict().items()})


def python_to_load(backbone: Backbone, file: str) -> str:
    """Return the Python code that loads the weights in `file` into the plain network. Nothing here executes it."""
    return (
        f"{backbone.load}\n\nfrom safetensors.torch import load_file\n\n"
        f"net.load_state_dict(load_file({json.dumps(file)}))\nnet.eval()"
    )


def load_encoder(path: Path) -> tuple[Backbone, dict[str, Any]]:
    """Return an exported encoder and its encoder.json, from their folder or either file, without executing anything.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit.
    """
    tensors = path / "encoder.safetensors" if path.is_dir() else path.with_suffix(".safetensors")
    about_file = tensors.with_suffix(".json")
    for file in (tensors, about_file):
        if not file.is_file():
            raise UserError(f"{path} holds no exported encoder ({file} is missing); type python -m icl_msr.export.")
    with readable(about_file, "export the encoder again"):
        about = read_json(about_file, "export the encoder again")
        recipe = about["recipe"]
    if recipe is None:
        raise UserError(f"{about_file} belongs to another package, whose own function must build the network.")
    try:
        backbone = from_recipe(recipe, str(tensors), BUILDERS)
    except UserError as error:
        raise UserError(f"{about_file}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValidationError):
        known = ", ".join(BUILDERS)
        raise UserError(
            f"{about_file} has a recipe that is unknown here (builders are {known}); export the encoder again."
        ) from None
    return backbone.eval(), about
