"""The interface of data sets: splits of labelled images, some with masks of the object."""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from unicodedata import normalize

import torch
from torch import Tensor

from icl_msr.augment.colour import channels
from icl_msr.core.errors import UserError


class Split(Protocol):
    """Labelled images in a fixed order."""

    labels: Tensor
    """Labels, (N,) int64."""

    def __len__(self) -> int: ...

    def load(self, index: Tensor) -> Tensor:
        """Return the whole images at `index` (n,) without augmentation, uint8 (n, 3, S, S)."""
        ...


@dataclass
class ArraySplit:
    """A split in memory. The DataModule moves it to the training device once."""

    images: Tensor
    """Images, (N, 3, S, S) uint8."""
    labels: Tensor
    """Labels, (N,) int64."""
    masks: Tensor | None = None
    """Masks, (N, S, S) bool, true on the object; None if the data set has none."""
    files: Sequence[str] | None = None
    """The file of each image; None if the images had no files of their own."""

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: Tensor) -> Tensor:
        """Return the images at `index` (n,), uint8 (n, 3, S, S)."""
        return self.images[index]


@dataclass(frozen=True)
class Attribute:
    """A property of the images beside their class, such as the background. A class and a value make a group."""

    name: str
    values: Sequence[str]
    """The names of the values; value k is the k-th."""
    of: Mapping[str, Tensor]
    """The value of each image, (N,) int64, by split: `train`, `balanced` or a test split; -1 if it is not known."""


@dataclass
class Dataset:
    """The splits of one data set.

    Test splits that show the same objects (`original`, `mixed_rand`, ...) are aligned. Position i holds the same object
    in each of them, so they can be compared image by image.
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
    """Test splits that show the classes in another way, such as sketches. They are compared with the first one."""
    superclasses: Sequence[str] | None = None
    """The coarse class of each class; None if the data set has no coarse classes."""
    notes: tuple[str, ...] = ()
    """Sentences that a user should read before training; see `remarks`."""
    labelled: "Dataset | None" = None
    """The data set that evaluation and the online monitors use instead, if the images of this one have no labels, or
    are shown to classifiers in another way."""
    attribute: Attribute | None = None
    """The property that makes groups of the images, together with the class; see `groups`."""

    def __post_init__(self) -> None:
        """Check that every label has a class; only training images may have none, -1."""
        for name, split in {"train": self.train, **self.tests}.items():
            lowest, highest = (int(split.labels.min()), int(split.labels.max())) if len(split) else (0, -1)
            if self.classes and lowest < (-1 if name == "train" else 0):
                raise UserError(
                    f"{self.name} has negative labels in {name}; labels count from 0, and only training images may "
                    "have -1, which means that they have none."
                )
            if highest >= max(len(self.classes), 1):
                raise UserError(
                    f"{self.name} has the label {highest} in {name} and only {len(self.classes)} classes; labels count "
                    "from 0."
                )

    def remarks(self) -> list[str]:
        """Return `notes` and remarks about the labels, one sentence each."""
        found = list(self.notes)
        if len(self.classes) == 1:
            found.append(f"{self.name} has one class, {self.classes[0]}, so that no accuracy means anything.")
        for name, split in [("training", self.train), *list(self.tests.items())[:1]]:
            there = set(torch.unique(split.labels).tolist())
            absent = [name for label, name in enumerate(self.classes) if label not in there]
            if absent:
                shown = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
                found.append(
                    f"{len(absent)} of the {len(self.classes)} classes of {self.name} have no {name} image: {shown}."
                )
        if self.classes and (without := int((self.train.labels < 0).sum())):
            found.append(f"{without} of the {len(self.train)} training images of {self.name} have no label.")
        alike = Counter(normalize("NFKC", name).casefold().strip() for name in self.classes)
        for name, times in alike.items():
            if times > 1:
                found.append(f"{times} classes of {self.name} are called {name} but for their spelling.")
        return found

    def trained_on(self) -> dict[str, Any]:
        """Return what must not change for a run to go on: the training images, their classes and their labels.

        Images with files are known by the files' names, so that a folder may move, and others by their pixels.
        """
        labels = hashlib.sha256(self.train.labels.cpu().numpy().tobytes()).hexdigest()
        about = {"images": len(self.train), "classes": list(self.classes), "labels": labels[:16]}
        files = getattr(self.train, "files", None)
        content = 0
        if files is not None:
            for i, name in enumerate(map(os.path.basename, files)):
                content = zlib.crc32(f"{'/' if i else ''}{name}".encode(errors="surrogateescape"), content)
        elif isinstance(self.train, ArraySplit):
            pixels: Any = self.train.images.cpu().contiguous().numpy()
            content = zlib.crc32(pixels)
        return {**about, "content": f"{content:08x}"}

    @property
    def group_names(self) -> list[str]:
        """The names of the groups, such as `waterbird, land`; group g is the g-th. Empty without an attribute."""
        values = () if self.attribute is None else self.attribute.values
        return [f"{name}, {value}" for name in self.classes for value in values]

    def groups(self, split: str) -> Tensor | None:
        """Return the group of each image of a split, int64 (N,) on the CPU; None if the groups are not known.

        `split` is `train`, `balanced` or a test split. -1 marks an image without a class or without a known value.
        """
        if self.attribute is None or split not in self.attribute.of:
            return None
        own = {"train": self.train, "balanced": self.balanced}
        of_split = own[split] if split in own else self.tests[split]
        assert of_split is not None
        labels, values = of_split.labels.cpu(), self.attribute.of[split]
        known = (labels >= 0) & (values >= 0)
        return torch.where(known, labels * len(self.attribute.values) + values, -1)

    @property
    def evaluated(self) -> "Dataset":
        """The data set that evaluation and the online monitors use."""
        return self.labelled or self

    @property
    def classified(self) -> bool:
        """True if there are labels of at least two classes."""
        return len(self.classes) > 1

    @property
    def chance(self) -> float:
        """Accuracy of guessing, in [0, 1]."""
        return 1.0 / max(1, len(self.classes))


def numbered_classes(labels: Tensor, images: int, where: str) -> list[str]:
    """Return the classes 0, 1, 2, ... of labels (N,) that are numbers; -1 means no label.

    Raises:
        UserError: the labels do not count from 0, or there are more numbers than `images`.
    """
    known = labels[labels >= 0]
    low, high = (int(known.min()), int(known.max())) if len(known) else (0, 0)
    if low > 0 or high >= images:
        raise UserError(
            f"{where} has labels from {low} to {high} for {images} images; they must count from 0: number the classes "
            "0, 1, 2, ..., or give them names."
        )
    return [str(k) for k in range(high + 1)]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert uint8 (N, 3, H, W) to float32, normalised by channel means and stds of values in [0, 1]."""
    shift, scale = (channels(tuple(values), images.device) for values in (mean, std))
    return (images.float() / 255 - shift) / scale
