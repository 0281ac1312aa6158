"""COCO images with one object. ICL-MSR shows on them that encoders use the background (Qiang et al. 2022)."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.listing import Listing, named_file
from icl_msr.data.sources import TrainOn


@dataclass
class _Image:
    id: int
    file_name: str
    width: PositiveInt
    height: PositiveInt


@dataclass
class _Annotation:
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    iscrowd: bool = False


@dataclass
class _Category:
    id: int
    name: str


@dataclass
class _Instances:
    """The part of an annotation file that is used. The rest, such as the outlines, is skipped on reading."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


@dataclass
class Target:
    """The only object of an image."""

    file: str
    name: str
    """The name of its category."""
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""
    beyond: float
    """The number of pixels by which the box of the file reaches beyond the image."""


def coco(
    *,
    root: str,
    train: str,
    test: str,
    train_annotations: str,
    test_annotations: str,
    classes: Annotated[int, Field(ge=2)] | Annotated[list[str], Field(min_length=2)],
    min_area: PositiveInt,
    image_size: PositiveInt,
    train_on: TrainOn,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
) -> Dataset:
    """Build a data set of the COCO images that show a single object of one of the `classes`; see `single_targets`.

    Args:
        root: the folder of the data set. The next four are absolute paths or paths in it.
        train: the folder of training images.
        test: the folder of test images.
        train_annotations: the .json file of the objects in training images, in COCO's format for object detection.
        test_annotations: the .json file of the objects in test images. Categories are matched by name.
        classes: the names of the classes, in the order of the labels; or their number K. A number takes the K classes
            with the most single-target training images, in the order of the file.
        min_area: smallest area of the box, in pixels (ours). Images with a smaller object are left out; 1 leaves out
            empty boxes.
        image_size: length of the short side, in pixels. The centre square is cut.
        train_on: `full` images, or `fg`, the inside of the box stretched to a square.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.

    The test images are shown in the regions `full`, `fg`, `crop`, `only_fg` and `only_bg` of `imagefolder`.

    Raises:
        UserError: a folder or file is missing or not in the format, there is no image of a class, or a box reaches
            more than a pixel beyond its image.
    """
    base = expanded(root)
    if not base.is_dir():
        raise UserError(f"There is no folder {base}; set dataset.root to the folder of COCO.")
    named = {"train": (train, train_annotations), "test": (test, test_annotations)}
    found = {part: single_targets(base / path, part, min_area) for part, (_, path) in named.items()}
    names = _chosen(classes, *found["train"], base / train_annotations)
    splits, notes = {}, []
    for part, (folder, path) in named.items():
        targets = [target for target in found[part][1] if target.name in names]
        if not targets:
            raise UserError(
                f"{base / path} has no image with a single object of the classes, {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}; set dataset.classes or dataset.{part}_annotations otherwise."
            )
        if out := next((target for target in targets if target.beyond > 1), None):
            raise UserError(
                f"The box of {out.file} in {base / path} reaches {out.beyond:g} pixels beyond the image; correct it."
            )
        if not (base / folder / targets[0].file).is_file():
            raise UserError(
                f"There is no image {base / folder / targets[0].file}, which {base / path} lists; "
                f"set dataset.{part} to the folder that has the images."
            )
        files = [named_file(base / folder, target.file, base / path) for target in targets]
        labels = torch.tensor([names.index(target.name) for target in targets])
        left_out = len(Listing(base / folder, follow_links=True).below(base / folder)) - len(files)
        if left_out:
            notes.append(f"{left_out} images of {base / folder} do not show one object of a class and are left out.")
        splits[part] = FileSplit(files, labels, image_size, torch.tensor([target.box for target in targets]))
    return of_files(
        base.resolve().name,
        names,
        splits["train"],
        {"test": splits["test"]},
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        notes=notes,
    )


def single_targets(path: Path, part: str, min_area: int) -> tuple[list[str], list[Target]]:
    """Return the categories of an annotation file and the images with a single object, in the order of the file.

    The paper says "one target". We count objects of any category, so that nothing annotated is left in the background,
    and a crowd (`iscrowd`) counts as several objects. The box grows to whole pixels and is cut to the image.

    Raises:
        UserError: the file is missing or not in the format. The message names the key `<part>_annotations`.
    """
    instances = _read(path, part)
    for what, keys in (
        ("two categories with the id", [category.id for category in instances.categories]),
        ("two images with the id", [image.id for image in instances.images]),
        ("twice the image", [image.file_name for image in instances.images]),
    ):
        key, times = next(iter(Counter(keys).most_common(1)), (None, 0))
        if times > 1:
            raise UserError(f"{path} has {what} {key}, so its objects cannot be told apart; correct it.")
    names = {category.id: category.name for category in instances.categories}
    objects = Counter(annotation.image_id for annotation in instances.annotations)
    alone = {a.image_id: a for a in instances.annotations if objects[a.image_id] == 1 and not a.iscrowd}
    targets = []
    for image in instances.images:
        if (annotation := alone.get(image.id)) is None:
            continue
        if annotation.category_id not in names:
            raise UserError(
                f"{path} gives {image.file_name} the category {annotation.category_id}, which it does not list; "
                "add it to the file's categories."
            )
        x0, y0, x1, y1 = box = _whole_pixels(annotation.bbox, image.width, image.height)
        if x0 < x1 and y0 < y1 and annotation.bbox[2] * annotation.bbox[3] >= min_area:
            beyond = _beyond(annotation.bbox, image.width, image.height)
            targets.append(Target(image.file_name, names[annotation.category_id], box, beyond))
    return list(names.values()), targets


def _read(path: Path, part: str) -> _Instances:
    if not path.is_file():
        raise UserError(f"There is no file {path}; set dataset.{part}_annotations to a .json file in COCO's format.")
    try:
        return TypeAdapter(_Instances).validate_json(path.read_bytes())
    except ValidationError as errors:
        first = errors.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is not an annotation file in COCO's format ({where}{': ' if where else ''}{first['msg']}); "
            f"set dataset.{part}_annotations to one such as instances_{part}2017.json."
        ) from None


def _whole_pixels(bbox: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Return COCO's box (x, y, width, height) as whole pixels (x0, y0, x1, y1) inside the image."""
    x, y, across, down = bbox
    x1, y1 = min(math.ceil(x + across), width), min(math.ceil(y + down), height)
    return max(math.floor(x), 0), max(math.floor(y), 0), x1, y1


def _beyond(bbox: Sequence[float], width: int, height: int) -> float:
    x, y, across, down = bbox
    return max(0.0, -x, -y, x + across - width, y + down - height)


def _chosen(classes: int | list[str], categories: list[str], targets: list[Target], path: Path) -> list[str]:
    """Return the names of the classes in the order of the labels."""
    count = Counter(target.name for target in targets)
    if isinstance(classes, int):
        if len(count) < classes:
            raise UserError(
                f"dataset.classes={classes} is more than the {len(count)} categories with a single-target image "
                f"in {path}; set it lower."
            )
        most = sorted(count, key=lambda name: (-count[name], categories.index(name)))[:classes]
        return sorted(most, key=categories.index)
    for number, name in enumerate(classes):
        if name not in categories:
            raise UserError(
                f"dataset.classes names {name}, which is not a category of {path}; {suggestion(name, categories)}"
            )
        if name in classes[:number]:
            raise UserError(f"dataset.classes names {name} twice; name it once.")
        if not count[name]:
            raise UserError(f"dataset.classes names {name}, and no image of {path} shows a single one; leave it out.")
    return classes
