"""Features on disk, found again by what they were made of: the encoder, the images, and what was done to them.

Nothing is ever out of date: another weight, image, normalisation, or code that makes them, has another name. What is
there can be removed.
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
    """A split that says itself what its images are."""

    def identity(self) -> str | None:
        """Equal for equal images alone; None where it cannot be said."""
        ...


class FeatureCache:
    """`features.extract`, done once: (encoder, split) to float32 (N, c), kept in a folder and in memory.

    Features are looked up by the encoder's weights and the Python that builds it, by the images (their bytes; of files
    that are decoded when they are needed: path, size and time of change), by mean and std, and by the versions and the
    kind of device and the precision that made them. The batch size is left out. Splits of other kinds are extracted
    anew. Ranks share the work and have one answer: all find features or all make them, and the first writes.

    Raises:
        UserError: nothing can be written to the folder. A disk that is full later costs the file, not the evaluation.
    """

    def __init__(self, folder: Path | None, autocast: torch.dtype | None = None) -> None:
        self.folder, self.autocast = folder, autocast
        self.held: dict[str, Tensor] = {}
        self.found = 0
        """How often nothing had to be extracted."""
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
        """See `features.extract`."""
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
        with suppress(OSError, SafetensorError, KeyError):  # damaged: made anew
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
        # Several processes may write the same features: each its own file, the last of which stays.
        own = path.with_name(f"{path.name}.{os.getpid()}")
        with suppress(OSError, UserError):
            atomic_write(own, save({"features": features.contiguous()}))
            os.replace(own, path)


def encoder_identity(encoder: torch.nn.Module) -> str | None:
    """Equal for encoders with equal weights and the same Python that builds them; None where that is not known."""
    if not isinstance(encoder, Backbone):
        return None
    state = [_tensor(name, value) for name, value in encoder.state_dict().items()]
    return _digest(encoder.load, *state)


def split_identity(split: Split) -> str | None:
    """Equal for the same images in the same order; None where that is not known."""
    if isinstance(split, ArraySplit):
        return _tensor("images", split.images)
    return split.identity() if isinstance(split, Identified) else None


@lru_cache
def _sources() -> str:
    """Of what makes images and features: parts of this package, and the libraries that decode and have the networks."""
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
