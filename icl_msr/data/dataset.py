"""What a data set is to the rest of the package: splits of labelled images, some with the object's mask."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from unicodedata import normalize

import torch
from torch import Tensor

from icl_msr.core.errors import UserError


class Split(Protocol):
    """Labelled images in a fixed order."""

    labels: Tensor
    """(N,) int64."""

    def __len__(self) -> int: ...

    def load(self, index: Tensor) -> Tensor:
        """The whole, un-augmented images at `index` (n,), as uint8 (n, 3, S, S)."""
        ...


@dataclass
class ArraySplit:
    """A split that lies in memory; the DataModule moves it to the training device once."""

    images: Tensor
    """(N, 3, S, S) uint8."""
    labels: Tensor
    """(N,) int64."""
    masks: Tensor | None = None
    """(N, S, S) bool, true on the object; None where the data set has none."""
    files: Sequence[str] | None = None
    """Where each image was read from, if it had a file of its own."""

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: Tensor) -> Tensor:
        """See `Split.load`."""
        return self.images[index]


@dataclass
class Dataset:
    """The splits of one data set.

    Test splits that show the same objects (`original`, `mixed_rand`, ...) are aligned: position i holds the same
    object in each of them, so that their difference can be taken image by image.
    """

    name: str
    classes: Sequence[str]
    image_size: int
    train: Split
    tests: Mapping[str, Split]
    balanced: Split | None = None
    """A small labelled split whose background says nothing about the class, for probes."""
    mean: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5))
    std: tuple[float, float, float] = field(default=(0.25, 0.25, 0.25))
    shifted: tuple[str, ...] = ()
    """Test splits that show the classes otherwise; they are compared with the first one."""
    superclasses: Sequence[str] | None = None
    """The coarse class of each class, where the data set has such."""
    notes: tuple[str, ...] = ()
    """What its user should know before anything is trained, a sentence each; see `remarks`."""
    labelled: "Dataset | None" = None
    """What evaluation and the online monitors use instead, where the images of this one have no labels."""

    def __post_init__(self) -> None:
        """Refuse labels that no class stands for."""
        for name, split in {"train": self.train, **self.tests}.items():
            highest = int(split.labels.max()) if len(split) else -1
            if highest >= max(len(self.classes), 1):
                raise UserError(
                    f"{self.name} has the label {highest} in {name} and only {len(self.classes)} classes; labels count "
                    "from 0."
                )

    def remarks(self) -> list[str]:
        """Return `notes`, and what the labels give reason to say, a sentence each."""
        found = list(self.notes)
        if len(self.classes) == 1:
            found.append(f"{self.name} has one class, {self.classes[0]}, so that no accuracy means anything.")
        for name, split in [("training", self.train), *list(self.tests.items())[:1]]:
            there = set(split.labels.tolist())
            absent = [name for label, name in enumerate(self.classes) if label not in there]
            if absent:
                shown = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
                found.append(
                    f"{len(absent)} of the {len(self.classes)} classes of {self.name} have no {name} image: {shown}."
                )
        alike = Counter(normalize("NFKC", name).casefold().strip() for name in self.classes)
        for name, times in alike.items():
            if times > 1:
                found.append(f"{times} classes of {self.name} are called {name} but for their spelling.")
        return found

    def trained_on(self) -> dict[str, Any]:
        """Return what must stay as it is for a run to go on: the number of training images, classes and labels."""
        labels = hashlib.sha256(self.train.labels.cpu().numpy().tobytes()).hexdigest()
        return {"images": len(self.train), "classes": list(self.classes), "labels": labels[:16]}

    @property
    def evaluated(self) -> "Dataset":
        """What evaluation and the online monitors use."""
        return self.labelled or self

    @property
    def classified(self) -> bool:
        """Do its labels tell images apart? They do not where there are none, or one class."""
        return len(self.classes) > 1

    @property
    def chance(self) -> float:
        """Accuracy of guessing, in [0, 1]."""
        return 1.0 / max(1, len(self.classes))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Uint8 (N, 3, H, W) to float32 with the given channel means and standard deviations (of values in [0, 1])."""
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - shift) / scale
