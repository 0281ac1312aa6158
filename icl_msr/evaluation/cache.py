"""Cache of features on disk. A file's name is a hash of the encoder, the images and the processing.

A file is never out of date: other weights, images, normalisation or code give another name. Files can be removed at any
time.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from icl_msr.core.distributed import everywhere, rank
from icl_msr.core.errors import UserError
from icl_msr.core.storage import atomic_write
from icl_msr.data.dataset import ArraySplit, Split
from icl_msr.evaluation.features import extract
from icl_msr.models.backbones import Backbone


@runtime_checkable
class Identified(Protocol):
    """A split that can identify its images."""

    def identity(self) -> str | None:
        """Return a text that is equal only for equal images; None if the images cannot be identified."""
        ...


class FeatureCache:
    """A cache around `features.extract`: (encoder, split) to float32 (N, c), kept in a folder and in memory.

    The key consists of the encoder's weights and the Python code that builds it, the images (their bytes, or path,
    size and time of change of files that are decoded on demand), mean and std, the versions of the libraries, the type
    of device, and the precision. The batch size is not part of it. Splits without an identity are not cached.
    Ranks share the work: all find the features or all extract them, and the first writes.

    Raises:
        UserError: the folder is not writable. A disk that is full later costs the file, not the evaluation.
    """

    def __init__(self, folder: Path | None, autocast: torch.dtype | None = None) -> None:
        self.folder, self.autocast = folder, autocast
        self.held: dict[str, Tensor] = {}
        self.found = 0
        """Number of calls that extracted nothing."""
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=folder).close()
            except OSError as error:
                raise UserError(
                    f"Features cannot be kept in {folder} ({error.strerror}); give another folder, cache=FOLDER, or "
                    "cache=null."
                ) from None

    def __call__(
        self,
        encoder: torch.nn.Module,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        batch_size: int,
        label: str = "features",
    ) -> Tensor:
        """Return the features of a split, float32 (N, c) on the CPU; the arguments are those of `features.extract`."""
        network, images = encoder_identity(encoder), split_identity(split)
        made_by = (*mean, *std, torch.device(device).type, torch.__version__, _sources())
        made_by += () if self.autocast is None else (self.autocast,)
        name = f"{network}/{_digest(images, *map(str, made_by))}.safetensors"
        known = network is not None and images is not None
        features = self._look_up(name, len(split)) if known else None
        if not everywhere(features is not None):
            features = extract(
                encoder,
                split,
                mean=mean,
                std=std,
                device=device,
                batch_size=batch_size,
                label=label,
                autocast=self.autocast,
                over_ranks=True,
            )
            if known:
                self._keep(name, features)
        else:
            self.found += 1
        assert features is not None
        return features

    def _look_up(self, name: str, images: int) -> Tensor | None:
        if name in self.held:
            return self.held[name]
        if self.folder is None:
            return None
        with suppress(OSError, SafetensorError, KeyError):  # a missing or damaged file is made again
            features = load_file(self.folder / name)["features"]
            if len(features) == images:
                self.held[name] = features
                return features
        return None

    def _keep(self, name: str, features: Tensor) -> None:
        self.held[name] = features
        if self.folder is None or rank() > 0:
            return
        path = self.folder / name
        # Several processes may write the same features. Each writes its own file, and the last one is kept.
        own = path.with_name(f"{path.name}.{os.getpid()}")
        with suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(own, save({"features": features.contiguous()}))
            os.replace(own, path)


def encoder_identity(encoder: torch.nn.Module) -> str | None:
    """Return a hash of an encoder's weights and of the Python code that builds it; None if the code is not known."""
    if not isinstance(encoder, Backbone):
        return None
    state = [_tensor(name, value) for name, value in encoder.state_dict().items()]
    return _digest(encoder.load, *state)


def split_identity(split: Split) -> str | None:
    """Return a text that is equal for the same images in the same order; None if they cannot be identified."""
    if isinstance(split, ArraySplit):
        return _tensor("images", split.images)
    return split.identity() if isinstance(split, Identified) else None


@lru_cache
def _sources() -> str:
    """Return a hash of the code behind images and features: parts of this package, and versions of libraries."""
    libraries = [f"{name} {version(name)}" for name in ("torchvision", "timm") if find_spec(name)]
    package = Path(__file__).parents[1]
    files: list[Path] = []
    for part in ("models", "data", "augment", "negatives", "evaluation"):
        files += (package / part).rglob("*.py")
    return _digest(*libraries, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)))


def _tensor(name: str, value: Tensor) -> str:
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return _digest(name, str(value.dtype), str(tuple(value.shape)), hashlib.sha256(content.data).hexdigest())


def _digest(*words: str | None) -> str:
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()[:32]
