"""Weights in files: exported encoders, and checkpoints that other programs wrote. They are read as data only."""

import argparse
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import is_stored

LARGEST_HEADER = 10_000_000
"""Largest size of the header of a .safetensors file, in bytes."""
COPIES = ("encoder_k", "momentum", "student")
"""Parts of names of networks that are not used after training: MoCo keeps `encoder_q`, DINO its teacher."""


def read_weights(weights: str, net: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file, or of a run folder's encoder, under the names that `net` has for them.

    A checkpoint of another program may hold several networks, each with a prefix such as `module.encoder_q.`. The
    tensors under the prefix that fits `net` are returned, including others such as a classifier. If no prefix fits, the
    names are those of the file.

    Raises:
        UserError: there is no such file, it would execute code, several networks fit, or the run folder has another
            format.
    """
    folder = RunFolder(Path(weights))
    if folder.begun:
        folder.require_format()
    path = folder.path / "encoder.safetensors" if folder.path.is_dir() else folder.path
    if not path.is_file():
        raise UserError(
            f"backbone.weights={weights} is neither a .safetensors file nor a run folder that holds "
            "encoder.safetensors, nor a checkpoint of PyTorch; give the path of one, or null to start from random "
            "weights."
        )
    states = {"": _safetensors(path)} if path.suffix == ".safetensors" else dict(_states(_checkpoint(path)))
    found = {f"{place}{prefix}": named for place, state in states.items() for prefix, named in _fitting(state, net)}
    chosen = {name: state for name, state in found.items() if not any(copy in name for copy in COPIES)} or found
    if len(chosen) > 1:
        raise UserError(
            f"{path} holds several networks that fit ({', '.join(sorted(chosen))}); write the one that you mean into a "
            f"file of its own: {_conversion(path, next(iter(chosen)), 'PREFIX')}"
        )
    if chosen:
        return next(iter(chosen.values()))
    if "" in states:
        return states[""]
    raise UserError(
        f"{path} holds no weights of this backbone under names that are known here; choose the backbone that it was "
        f"trained with, or rename them: {_conversion(path, next(iter(states), ''), 'PREFIX')}"
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if LARGEST_HEADER < header < path.stat().st_size:
        raise UserError(f"{path} has a header of {header / 1e6:.0f} MB, as no file of weights has; export it again.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); export the encoder again.") from None


def _checkpoint(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not is_stored(archive, path):
                raise UserError(f"{path} is compressed, as no checkpoint of PyTorch is; give it as it was saved.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # saved arguments of a program, plain data
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and could execute code, so it was not loaded; where you trust it, "
            f"convert it: {_conversion(path, 'state_dict/', '')}"
        ) from None
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{path} cannot be read as a checkpoint of PyTorch ({reason}); give another file.") from None


def _conversion(path: Path, place: str, prefix: str) -> str:
    """Return one line of Python that writes the tensors at a place of a checkpoint as safetensors."""
    inside = "".join(f"[{key!r}]" for key in place.split("/")[:-1])
    names = f"k.removeprefix({prefix!r}): v.clone() for k, v in state.items() if k.startswith({prefix!r})"
    return (
        "import torch, safetensors.torch; "
        f"state = torch.load({str(path)!r}, 'cpu', weights_only={bool(prefix)}){inside}; "
        f"safetensors.torch.save_file({{{names if prefix else 'k: v.clone() for k, v in state.items()'}}}, "
        f"'{path.name.partition('.')[0]}.safetensors')."
    )


def _states(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping from names to tensors in a checkpoint, each once, with its place: `state_dict/`."""
    waiting, seen = [("", content)], set[int]()
    while waiting:
        place, content = waiting.pop(0)
        if not isinstance(content, Mapping) or id(content) in seen:
            continue
        seen.add(id(content))
        named = {name: value for name, value in content.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            yield place, tensors
        waiting += [(f"{place}{name}/", part) for name, part in named.items()]


def _fitting(state: Mapping[str, Tensor], net: nn.Module) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the prefixes under which a state dict holds all of a network, each with its tensors, without the prefix.

    A network inside `nn.Sequential`, as in lightly, has numbers in place of its layers' names.
    """
    ours = net.state_dict()
    if not ours:
        return
    numbers = {name: str(number) for number, (name, _) in enumerate(net.named_children())}
    for numbered in (False, True):
        theirs = {name: _numbered(name, numbers) if numbered else name for name in ours}
        back = {written: name for name, written in theirs.items()}
        first = next(iter(theirs.values()))
        prefixes = [name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")]
        for prefix in dict.fromkeys(prefixes):
            inside = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
            named = {back.get(name, name): tensor for name, tensor in inside.items()}
            counters = {n: t for n, t in ours.items() if n.endswith(".num_batches_tracked")}  # old files have none
            if all(n in named and named[n].shape == t.shape for n, t in ours.items() if n not in counters):
                yield prefix, counters | named


def _numbered(name: str, numbers: Mapping[str, str]) -> str:
    layer, dot, rest = name.partition(".")
    return f"{numbers.get(layer, layer)}{dot}{rest}"
