"""Data sets whose published layout needs more than folders of classes."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.listing import Listing, is_number, named_file
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
    tables = {base / "train" / name / f"{name}_boxes.txt": name for name in classes}
    train = [(table, [row[0], name, *row[1:]]) for table, name in tables.items() for row in _table(table, 5)]
    val = [(table, row) for table in [base / "val/val_annotations.txt"] for row in _table(table, 6)]
    splits, left_out = [], 0
    for listed in (train, val):
        unknown = next((row[1] for _, row in listed if row[1] not in classes), None)
        if unknown is not None:
            raise UserError(f"{base}/val/val_annotations.txt names {unknown}, which is not a folder of {base}/train.")
        names: dict[Path, list[str]] = {}
        for table, row in listed:
            names.setdefault(table, []).append(row[0])
        files = [file for table, own in names.items() for file in _files(table.parent / "images", own, table)]
        boxes = [(int(x0), int(y0), int(x1) + 1, int(y1) + 1) for _, (_, _, x0, y0, x1, y1, *_) in listed]
        labels = torch.tensor([classes.index(row[1]) for _, row in listed])
        splits.append(FileSplit(files, labels, image_size, torch.tensor(boxes)))
        left_out += sum(_count(table.parent / "images") for table in names) - len(files)
    return of_files(
        "tiny_imagenet",
        classes,
        splits[0],
        {"test": splits[1]},
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        notes=_left_out(base, left_out),
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
    breeds = {(int(row[1]), re.sub(r"_\d+$", "", row[0])) for listed in rows.values() for row in listed}
    numbers, classes = [number for number, _ in sorted(breeds)], [name for _, name in sorted(breeds)]
    if len(set(numbers)) < len(breeds) or len(set(classes)) < len(breeds):
        wrong = next(pair for pair in sorted(breeds) if numbers.count(pair[0]) > 1 or classes.count(pair[1]) > 1)
        raise UserError(
            f"{base}/annotations/trainval.txt and test.txt do not number the breeds one to one, see {wrong[1]} and "
            f"{wrong[0]}; correct them."
        )
    splits = {}
    for part, listed in rows.items():
        table = base / f"annotations/{part}.txt"
        splits[part] = FileSplit(
            _files(base / "images", [f"{row[0]}.jpg" for row in listed], table),
            torch.tensor([numbers.index(int(row[1])) for row in listed]),
            image_size,
            mask_files=_files(base / "annotations/trimaps", [f"{row[0]}.png" for row in listed], table),
            mask_values="trimap",
        )
    return of_files(
        "oxford_pets",
        classes,
        splits["trainval"],
        {"test": splits["test"]},
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        notes=_left_out(base, _count(base / "images") - sum(map(len, rows.values()))),
    )


def _folder(root: str) -> Path:
    base = expanded(root)
    if not base.is_dir():
        raise UserError(f"There is no folder {base}; set dataset.root to the folder as it was unpacked.")
    return base


def _files(folder: Path, names: Sequence[str], table: Path) -> list[str]:
    """Return the paths of the images that a table names, each once; see `named_file`."""
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{table} names {name} {times} times; keep one row.")
    return [named_file(folder, name, table) for name in names]


def _count(folder: Path) -> int:
    return len(Listing(folder).below(folder))


def _left_out(base: Path, count: int) -> list[str]:
    return [f"{count} images of {base} are in no table and are left out."] if count else []


def _table(path: Path, columns: int) -> Sequence[Sequence[str]]:
    """Return the rows of a text file, checked to have this many columns, of which the last ones are numbers."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; set dataset.root to the folder as it was unpacked.")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    if not rows:
        raise UserError(f"{path} is empty; set dataset.root to the folder as it was unpacked.")
    for number, row in enumerate(rows, 1):
        if len(row) < columns or not all(map(is_number, row[columns - (4 if columns > 4 else 1) : columns])):
            raise UserError(f"Row {number} of {path} is not as published: {' '.join(row)}.")
    return rows
