"""Files that outlive a process: the checkpoint that a run continues from, and the encoder, of use without icl_msr."""

import errno
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pydantic import ValidationError
from safetensors.torch import save

from icl_msr.encoders import Backbone, from_recipe, resnet, timm_model, tiny
from icl_msr.errors import UserError
from icl_msr.lab import half_encoder, lab_encoder

BUILDERS: dict[str, Callable[..., Backbone]] = {
    "tiny": tiny,
    "resnet": resnet,
    "timm_model": timm_model,
    "lab_encoder": lab_encoder,
    "half_encoder": half_encoder,
}
"""The only functions that the recipe in an encoder.json can name."""


def atomic_write(path: Path, content: bytes | str, advice: str = "repeat the command") -> None:
    """Writes a file whole or not at all, however the process ends; one writer at a time.

    Raises:
        UserError: the disk is full; the old file, if any, is still there. `advice` is what to do once there is room.
    """
    with _replacing(path, advice) as file:
        file.write(content.encode() if isinstance(content, str) else content)


class AtomicCheckpoint(TorchCheckpointIO):
    """Checkpoints of which the old or the new one is there at any moment, and which are data alone.

    Lightning's own way holds a second copy in memory, writes it into the system's temporary folder without syncing
    it, and moves it from there: across file systems that is a copy, which a kill leaves half done.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes beside the old file, then takes its place.

        Raises:
            UserError: the disk is full; the old checkpoint, if any, is still there.
        """
        path = Path(path)
        with _replacing(path, f"continue with resume={path.parent.parent}") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """See `read_checkpoint`: always to the CPU, always data alone."""
        return read_checkpoint(Path(path))


@contextmanager
def _replacing(path: Path, advice: str) -> Iterator[IO[bytes]]:
    """A file beside `path` that takes its place once it is whole and on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")  # always the same: what a kill leaves, the next one overwrites
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if disk_is_full(error):
            kept = f"the previous {path.name}, if any, is kept"
            raise UserError(f"The disk of {path.parent} is full; {kept}: free space and {advice}.") from None
        raise
    with suppress(OSError):  # some network file systems cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def disk_is_full(error: BaseException | None) -> bool:
    """Also where torch, closing its archive, has put an error of its own in front."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A run's checkpoint, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: there is none, it is damaged, it would execute code, or another program wrote it.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; give a run that has come to the end of its first epoch.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None  # torch writes checksums and never looks at them
    except Exception:
        damaged = True
    if damaged:
        raise UserError(f"{path} is damaged, cut short or no checkpoint; restore it from a copy, or begin a new run.")
    content: Any = None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} could execute code, so it was not loaded; give a checkpoint of icl_msr.") from error
    except Exception:
        pass  # an archive of another kind
    state = content.get("state_dict") if isinstance(content, dict) else None
    ours = isinstance(state, dict) and any(str(name).startswith("method.") for name in state)
    if not (ours and {"loops", "global_step"} <= content.keys()):
        raise UserError(f"{path} is no checkpoint of icl_msr; give a run's checkpoints/last.ckpt.")
    checkpoint: dict[str, Any] = content
    return checkpoint


def export_encoder(backbone: Backbone, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Writes `encoder.safetensors` and `encoder.json` into a folder, and `encoder-<part>` likewise; returns the first.

    The weights fit the plain torchvision or timm model that the Python under `load` builds; `recipe` says the same to
    `load_encoder`. `facts` (data set, mean, standard deviation, image size, method, ...) are plain data that stand
    beside it.
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
    """What is exported of a backbone, by the name of the file with the weights: itself, then its parts, if any."""
    parts = {f"encoder-{name}.safetensors": part for name, part in backbone.parts().items()}
    return {"encoder.safetensors": backbone, **parts}


def weights(backbone: Backbone) -> bytes:
    """The plain network's state dict as safetensors."""
    # safetensors keeps no strides: weights in channels_last are laid out again.
    return save({name: tensor.cpu().contiguous() for name, tensor in backbone.net.state_dict().items()})


def python_to_load(backbone: Backbone, file: str) -> str:
    """What a person types to have the network with the weights in `file`; nothing here executes it."""
    return (
        f"{backbone.load}\n\nfrom safetensors.torch import load_file\n\n"
        f"net.load_state_dict(load_file({json.dumps(file)}))\nnet.eval()"
    )


def load_encoder(path: Path) -> tuple[Backbone, dict[str, Any]]:
    """An exported encoder and its encoder.json, from their folder or either file. Nothing in them is executed.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit.
    """
    tensors = path / "encoder.safetensors" if path.is_dir() else path.with_suffix(".safetensors")
    about_file = tensors.with_suffix(".json")
    for file in (tensors, about_file):
        if not file.is_file():
            raise UserError(f"{path} holds no exported encoder ({file} is missing); type python -m icl_msr.export.")
    try:
        about: dict[str, Any] = json.loads(about_file.read_text())
        recipe = about["recipe"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{about_file} is damaged or of another program; export the encoder again.") from None
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
