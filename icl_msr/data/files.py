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
from icl_msr.data.crops import boxes_around, moved
from icl_msr.data.dataset import ArraySplit, Dataset, Split
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
    """The mask file of each image, of the same size as the image; see `sources.read_mask`."""
    region: Region = "full"
    mask_values: MaskValues = None
    """The values of a mask that are the object."""
    encoded: Encoded | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def located(self) -> bool:
        """True if there are boxes or masks."""
        return self.boxes is not None or self.mask_files is not None

    def source(self, i: int) -> Path | bytes:
        """Return the path of image i, or the content of its file."""
        return Path(self.files[i]) if self.encoded is None else self.encoded[i]

    def image(self, i: int) -> Tensor:
        """Return the region of image i in its own resolution, uint8 (3, H, W). Random crops are cut from it."""
        image = read_image(self.source(i), self.files[i])
        if self.region == "full":
            return image
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
                for _ in pool.map(lambda i: fits(i, *read_size(self.source(i), self.files[i])), range(len(self))):
                    pass

    def square(self, image: Tensor) -> Tensor:
        """Return an image as `load` shows it, uint8 (3, S, S). Cut-out regions are stretched, others cut centrally."""
        return resize(image[None], self.image_size)[0] if self.region in CUT_OUT else fit(image, self.image_size)

    def load(self, index: Tensor) -> Tensor:
        """Return the images at `index` (n,), uint8 (n, 3, S, S)."""
        return torch.stack([self.square(self.image(i)) for i in index.tolist()])

    def in_memory(self) -> ArraySplit:
        """Decode the split and return it as an `ArraySplit`."""
        images = stack(lambda i: self.square(self.image(i)), len(self), "Decoding images")
        masks = None
        if self.region == "full" and self.located:
            masks = stack(self._square_mask, len(self), "Reading masks")
        return ArraySplit(images, self.labels, masks, self.files)

    def identity(self) -> str:
        """Return a text that is equal for the same images in the same order and the same region."""
        boxes = "" if self.boxes is None else str(self.boxes.tolist())
        shown = (str(self.image_size), self.region, boxes, str(self.mask_values))
        files = self.files if self.encoded is None else []
        where = [_state(file) for file in (*files, *(self.mask_files or []))]
        text = "\0".join([*shown, *where, "" if self.encoded is None else self.encoded.identity()])
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
        mask = read_mask(Path(self.mask_files[i]), self.mask_files[i], self.mask_values)
        if mask.shape != (height, width):
            raise UserError(
                f"The mask {self.mask_files[i]} of {mask.shape[1]} x {mask.shape[0]} and the image {self.files[i]} of "
                f"{width} x {height} differ in size; put the mask of that image there."
            )
        return mask

    def _square_mask(self, i: int) -> Tensor:
        mask = self.mask(i, read_image(self.source(i), self.files[i]))
        return fit(mask[None].byte(), self.image_size, nearest=True)[0].bool()


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
    lazy = {"train": replace(train, region=train_on)}
    for test, whole in tests.items():
        for region in REGIONS if whole.located else REGIONS[:1]:
            key = test_name(test, region, single=len(tests) == 1) if whole.located else test
            lazy[f"test {key}"] = replace(whole, region=region)
    shifted = shifted or {}
    for other, split in shifted.items():
        if f"test {other}" in lazy:
            raise UserError(f"dataset.shifted.{other} is a test split already; give it another name.")
        lazy[f"test {other}"] = split

    splits: dict[str, Split] = dict(lazy)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    gigabytes = sum(map(len, lazy.values())) * 3 * train.image_size**2 / 1e9
    if train.image_size <= resident_size and gigabytes <= memory_budget_gb:
        decoded = {key: part.in_memory() for key, part in lazy.items()}
        mean, std = statistics(decoded["train"].images)
        splits = dict(decoded)
    else:
        for split in (*tests.values(), *([train] if train_on == "fg" else [])):
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
