"""Splits of image files that are decoded when they are needed, and data sets of such splits."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from icl_msr.augment import resize
from icl_msr.core.errors import UserError
from icl_msr.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from icl_msr.core.randomness import permutation
from icl_msr.data.crops import boxes_around, moved
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.names import Names, compact
from icl_msr.data.sources import (
    REGIONS,
    MaskValues,
    Region,
    TrainOn,
    cores,
    fit,
    read_image,
    read_mask,
    read_size,
    show,
    stack,
    statistics,
    test_name,
)

CUT_OUT = ("fg", "crop")


class Encoded(Protocol):
    """Image files inside a table or an archive."""

    def __getitem__(self, index: int, /) -> bytes:
        """Return the content of the image file at `index`."""
        ...

    def prepare(self, index: Tensor) -> None:
        """Fetch the files at `index` (n,) together, where fetching each by itself is slow."""
        ...

    def identity(self) -> str:
        """Return a text that is equal for the same files in the same order, in every process."""
        ...


@dataclass
class FileSplit:
    """A split that is decoded when it is needed."""

    files: Sequence[str]
    """The path of each image, or only a name if the images are in `encoded`."""
    labels: Tensor
    """Labels, (N,) int64."""
    image_size: int
    boxes: Tensor | None = None
    """Boxes around the object, (N, 4) int64: x0, y0, x1, y1 in pixels of the upright image, x1 and y1 exclusive."""
    mask_files: Sequence[str] | None = None
    """The mask file of each image, of the same size as the image, or its name; see `sources.read_mask`."""
    region: Region = "full"
    mask_values: MaskValues = None
    """The values of a mask that are the object."""
    encoded: Encoded | None = None
    encoded_masks: Encoded | None = None
    resize: int | None = None
    """The short side of an un-augmented image in pixels, before its centre square is cut out; None: `image_size`."""

    def __post_init__(self) -> None:
        """Keep the names in little memory."""
        self.files = compact(self.files)
        if self.mask_files is not None:
            self.mask_files = compact(self.mask_files)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def located(self) -> bool:
        """True if there are boxes or masks."""
        return self.boxes is not None or self.mask_files is not None

    def source(self, i: int) -> Path | bytes:
        """Return the path of image i, or the content of its file."""
        return Path(self.files[i]) if self.encoded is None else self.encoded[i]

    def mask_source(self, i: int) -> Path | bytes:
        """Return the path of the mask of image i, or the content of its file."""
        assert self.mask_files is not None
        return Path(self.mask_files[i]) if self.encoded_masks is None else self.encoded_masks[i]

    def part(self, index: Tensor) -> "FileSplit":
        """Return the images at `index` (n,), in this order."""
        chosen = index.tolist()
        return replace(
            self,
            files=Names(self.files[i] for i in chosen),
            labels=self.labels[index],
            boxes=None if self.boxes is None else self.boxes[index],
            mask_files=None if self.mask_files is None else Names(self.mask_files[i] for i in chosen),
            encoded=None if self.encoded is None else _Part(self.encoded, index),
            encoded_masks=None if self.encoded_masks is None else _Part(self.encoded_masks, index),
        )

    def divided(self, held_out: float) -> tuple["FileSplit", "FileSplit"]:
        """Return the images without a part that is held out, and this part. It is always the same images."""
        order = permutation(0, 0, len(self))
        count = max(1, round(held_out * len(self)))
        return self.part(order[count:].sort().values), self.part(order[:count].sort().values)

    def prepare(self, index: Tensor) -> None:
        """Fetch the images at `index` (n,), and the masks that their region needs, where they come from afar."""
        masks = None if self.region == "full" else self.encoded_masks
        for encoded in (self.encoded, masks):
            if encoded is not None:
                encoded.prepare(index)

    def size(self, i: int) -> tuple[int, int]:
        """Return height and width of the whole image i in pixels. Only the header of its file is read."""
        return read_size(self.source(i), self.files[i])

    def image(self, i: int, reduction: int = 1) -> Tensor:
        """Return the region of image i in its own resolution, uint8 (3, H, W). Random crops are cut from it.

        A whole image may be smaller by the factor `reduction`; see `read_image`.
        """
        if self.region == "full":
            return read_image(self.source(i), self.files[i], reduction)
        image = read_image(self.source(i), self.files[i])
        mask = self.mask(i, image)
        if self.region in CUT_OUT:
            box = boxes_around(mask[None])
            if self.region == "crop":
                box = moved(box, mask.shape[0], mask.shape[1], torch.tensor([i]))
            x0, y0, x1, y1 = box[0].tolist()
            return image[:, y0:y1, x0:x1]
        return show(image[None], mask[None], self.region)[0]

    def mask(self, i: int, image: Tensor) -> Tensor:
        """Return the mask of image i (3, H, W): bool (H, W).

        Raises:
            UserError: the mask or the box does not fit the image.
        """
        height, width = image.shape[1:]
        if self.mask_files is not None:
            return self._mask(i, height, width)
        assert self.boxes is not None
        mask = torch.zeros(height, width, dtype=torch.bool)
        x0, y0, x1, y1 = self._box(i, height, width)
        mask[y0:y1, x0:x1] = True
        return mask

    def check_objects(self) -> None:
        """Check every box or mask against the size of its image.

        Raises:
            UserError: a box or a mask does not fit its image.
        """
        if self.located:
            fits = self._mask if self.mask_files is not None else self._box
            with ThreadPoolExecutor(cores()) as pool:
                for _ in pool.map(lambda i: fits(i, *self.size(i)), range(len(self))):
                    pass

    def square(self, image: Tensor) -> Tensor:
        """Return an image as `load` shows it, uint8 (3, S, S). Cut-out regions are stretched, others cut centrally."""
        if self.region in CUT_OUT:
            return resize(image[None], self.image_size)[0]
        return fit(image, self.image_size, resize=self.resize)

    def load(self, index: Tensor) -> Tensor:
        """Return the images at `index` (n,), uint8 (n, 3, S, S)."""
        self.prepare(index)
        return torch.stack([self.square(self.image(i)) for i in index.tolist()])

    def in_memory(self) -> ArraySplit:
        """Decode the split and return it as an `ArraySplit`."""
        self.prepare(torch.arange(len(self)))
        images = stack(lambda i: self.square(self.image(i)), len(self), "Decoding images")
        masks = None
        if self.region == "full" and self.located:
            masks = stack(self._square_mask, len(self), "Reading masks")
        return ArraySplit(images, self.labels, masks, self.files)

    def identity(self) -> str:
        """Return a text that is equal for the same images in the same order and the same region."""
        boxes = "" if self.boxes is None else str(self.boxes.tolist())
        shown = (
            str(self.image_size),
            self.region,
            boxes,
            str(self.mask_values),
            *([] if self.resize is None else [str(self.resize)]),
        )
        files = self.files if self.encoded is None else []
        masks = (self.mask_files or []) if self.encoded_masks is None else []
        where = [_state(file) for file in (*files, *masks)]
        inside = ["" if part is None else part.identity() for part in (self.encoded, self.encoded_masks)]
        text = "\0".join([*shown, *where, *inside])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

    def _box(self, i: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the box of image i of this size, after checking it."""
        assert self.boxes is not None
        x0, y0, x1, y1 = self.boxes[i].tolist()
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"The box of {self.files[i]}, x {x0} to {x1 - 1} and y {y0} to {y1 - 1}, lies outside the image of "
                f"{width} x {height}; correct it (xmax and ymax are the last pixel inside, of the upright image)."
            )
        return x0, y0, x1, y1

    def _mask(self, i: int, height: int, width: int) -> Tensor:
        """Return the mask of image i of this size, after checking it."""
        assert self.mask_files is not None
        mask = read_mask(self.mask_source(i), self.mask_files[i], self.mask_values)
        if mask.shape != (height, width):
            raise UserError(
                f"The mask {self.mask_files[i]} of {mask.shape[1]} x {mask.shape[0]} and the image {self.files[i]} of "
                f"{width} x {height} differ in size; put the mask of that image there."
            )
        return mask

    def _square_mask(self, i: int) -> Tensor:
        mask = self.mask(i, read_image(self.source(i), self.files[i]))
        return fit(mask[None].byte(), self.image_size, nearest=True)[0].bool()


@dataclass
class _Part:
    """Some of the image files inside a table or an archive."""

    whole: Encoded
    rows: Tensor
    """The row of each file, (N,) int64."""

    def __getitem__(self, index: int, /) -> bytes:
        return self.whole[int(self.rows[index])]

    def prepare(self, index: Tensor) -> None:
        self.whole.prepare(self.rows[index])

    def identity(self) -> str:
        return f"{self.whole.identity()} {self.rows.tolist()}"


def _state(file: str) -> str:
    about = os.stat(file)
    return f"{Path(file).absolute()} {about.st_size} {about.st_mtime_ns}"


def of_files(
    name: str,
    classes: Sequence[str],
    train: FileSplit,
    tests: Mapping[str, FileSplit],
    train_on: TrainOn,
    *,
    resident_size: int,
    memory_budget_gb: float,
    shifted: Mapping[str, FileSplit] | None = None,
    notes: Sequence[str] = (),
) -> Dataset:
    """Make a data set of image files. Test splits with boxes or masks are shown in every region.

    Small images are decoded now if the memory budget allows it. `imagefolder` explains the arguments.

    Raises:
        UserError: a box or a mask that is used does not fit its image, or a small image cannot be read.
    """
    shown: dict[str, FileSplit] = {}
    for test, whole in tests.items():
        for region in REGIONS if whole.located else REGIONS[:1]:
            key = test_name(test, region, single=len(tests) == 1) if whole.located else test
            shown[key] = replace(whole, region=region)
    for other, split in (shifted or {}).items():
        if other in shown:
            raise UserError(f"dataset.shifted.{other} is a test split already; give it another name.")
        shown[other] = split
    return of_shown(
        name,
        classes,
        replace(train, region=train_on),
        shown,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        shifted=tuple(shifted or ()),
        notes=notes,
    )


def of_shown(
    name: str,
    classes: Sequence[str],
    train: FileSplit,
    tests: Mapping[str, FileSplit],
    *,
    resident_size: int,
    memory_budget_gb: float,
    shifted: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Dataset:
    """Make a data set of image files whose splits show their regions already; see `of_files`."""
    lazy = {"train": train, **{f"test {key}": split for key, split in tests.items()}}
    splits: dict[str, Split] = dict(lazy)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    gigabytes = sum(map(len, lazy.values())) * 3 * train.image_size**2 / 1e9
    if train.image_size <= resident_size and gigabytes <= memory_budget_gb:
        decoded = {key: part.in_memory() for key, part in lazy.items()}
        mean, std = statistics(decoded["train"].images)
        splits = dict(decoded)
    else:
        for split in (
            *(test for test in tests.values() if test.region == "full"),
            *([train] if train.region == "fg" else []),
        ):
            split.check_objects()
    shown = {key.removeprefix("test "): part for key, part in splits.items() if key != "train"}
    return Dataset(
        name,
        classes,
        train.image_size,
        splits["train"],
        shown,
        mean=mean,
        std=std,
        shifted=tuple(shifted),
        notes=tuple(notes),
    )
