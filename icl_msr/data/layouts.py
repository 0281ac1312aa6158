"""Data sets whose published layout needs more than folders of classes."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.sources import TrainOn


def tiny_imagenet(
    *,
    root: str,
    image_size: PositiveInt,
    train_on: TrainOn,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
) -> Dataset:
    """Build Tiny-ImageNet-200 as Stanford's CS231n published it: 200 classes, one box around the object of every image.

    It reads `train/<wnid>/images/*.JPEG` with `train/<wnid>/<wnid>_boxes.txt`, and `val/images/*.JPEG` with
    `val/val_annotations.txt`. The images of `test` have no labels and are left out.

    Args:
        root: the folder tiny-imagenet-200.
        image_size: length of the short side, in pixels; 64 as published.
        train_on: `full` images, or `fg`, the inside of the box stretched to a square.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.
    """
    base = _folder(root)
    classes = sorted(path.name for path in (base / "train").glob("n*") if path.is_dir())
    if not classes:
        raise UserError(f"{base} has no train/<wnid> folders; set dataset.root to the folder tiny-imagenet-200.")
    train = [
        (base / "train" / name / "images" / row[0], name, row[1:5])
        for name in classes
        for row in _table(base / "train" / name / f"{name}_boxes.txt", 5)
    ]
    val = [(base / "val/images" / row[0], row[1], row[2:6]) for row in _table(base / "val/val_annotations.txt", 6)]
    splits = []
    for rows in (train, val):
        unknown = next((name for _, name, _ in rows if name not in classes), None)
        if unknown is not None:
            raise UserError(f"{base}/val/val_annotations.txt names {unknown}, which is not a folder of {base}/train.")
        boxes = [(int(x0), int(y0), int(x1) + 1, int(y1) + 1) for _, _, (x0, y0, x1, y1) in rows]
        labels = torch.tensor([classes.index(name) for _, name, _ in rows])
        splits.append(FileSplit([str(path) for path, _, _ in rows], labels, image_size, torch.tensor(boxes)))
    return of_files(
        "tiny_imagenet",
        classes,
        splits[0],
        {"test": splits[1]},
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
    )


def oxford_pets(
    *,
    root: str,
    image_size: PositiveInt,
    train_on: TrainOn,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
) -> Dataset:
    """Build Oxford-IIIT Pet: 37 breeds, 3,680 training and 3,669 test images with trimaps (Parkhi et al., CVPR 2012).

    It reads `images/*.jpg`, `annotations/trainval.txt`, `annotations/test.txt` and `annotations/trimaps/*.png`. In a
    trimap, 1 is the pet, 2 the background and 3 the border between them. The border counts as background.

    Args:
        root: the folder that has `images` and `annotations`.
        image_size: length of the short side, in pixels. The centre square is cut.
        train_on: `full` images, or `fg`, the inside of the box around the pet stretched to a square.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.
    """
    base = _folder(root)
    rows = {part: _table(base / f"annotations/{part}.txt", 2) for part in ("trainval", "test")}
    names = {int(row[1]): re.sub(r"_\d+$", "", row[0]) for row in (*rows["trainval"], *rows["test"])}
    classes = [names[number] for number in sorted(names)]
    splits = {
        part: FileSplit(
            [str(base / f"images/{row[0]}.jpg") for row in listed],
            torch.tensor([classes.index(names[int(row[1])]) for row in listed]),
            image_size,
            mask_files=[str(base / f"annotations/trimaps/{row[0]}.png") for row in listed],
            mask_values="trimap",
        )
        for part, listed in rows.items()
    }
    return of_files(
        "oxford_pets",
        classes,
        splits["trainval"],
        {"test": splits["test"]},
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
    )


def _folder(root: str) -> Path:
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"There is no folder {base}; set dataset.root to the folder as it was unpacked.")
    return base


def _table(path: Path, columns: int) -> Sequence[Sequence[str]]:
    """Return the rows of a text file, checked to have this many columns, of which the last ones are numbers."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; set dataset.root to the folder as it was unpacked.")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    for number, row in enumerate(rows, 1):
        if len(row) < columns or not all(
            word.isdecimal() for word in row[columns - (4 if columns > 4 else 1) : columns]
        ):
            raise UserError(f"Row {number} of {path} is not as published: {' '.join(row)}.")
    return rows
