"""Folders of images, with the object's box or mask where it is known."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from icl_msr.augment import resize
from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from icl_msr.core.randomness import permutation
from icl_msr.data.crops import boxes_of, moved
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.sources import (
    REGIONS,
    Region,
    TrainOn,
    fit,
    read_image,
    show,
    stack,
    statistics,
    test_name,
)

CUT_OUT = ("fg", "crop")


@dataclass
class FileSplit:
    """A split that is decoded when it is needed."""

    files: list[str]
    labels: Tensor
    """(N,) int64."""
    image_size: int
    boxes: Tensor | None = None
    """(N, 4) int64 around the object: x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""
    mask_files: list[str] | None = None
    """One image per image, of its size, not black on the object."""
    region: Region = "full"

    def __len__(self) -> int:
        return len(self.files)

    @property
    def located(self) -> bool:
        """Is it known where the object is?"""
        return self.boxes is not None or self.mask_files is not None

    def image(self, i: int) -> Tensor:
        """The region of image i in its own resolution, uint8 (3, H, W): what random crops are cut from."""
        image = read_image(Path(self.files[i]), self.files[i])
        if self.region == "full":
            return image
        mask = self.mask(i, image)
        if self.region in CUT_OUT:
            box = boxes_of(mask[None])
            if self.region == "crop":
                box = moved(box, mask.shape[0], mask.shape[1], torch.tensor([i]))
            x0, y0, x1, y1 = box[0].tolist()
            return image[:, y0:y1, x0:x1]
        return show(image[None], mask[None], self.region)[0]

    def mask(self, i: int, image: Tensor) -> Tensor:
        """The mask of image i (3, H, W): bool (H, W)."""
        if self.mask_files is not None:
            mask = (read_image(Path(self.mask_files[i]), self.mask_files[i]) > 0).any(0)
            if mask.shape != image.shape[1:]:
                raise UserError(f"The mask {self.mask_files[i]} and the image {self.files[i]} differ in size.")
            return mask
        assert self.boxes is not None
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        x0, y0, x1, y1 = self.boxes[i].tolist()
        mask[y0:y1, x0:x1] = True
        if not mask.any():
            raise UserError(f"The box of {self.files[i]} lies outside the image of {mask.shape[1]} x {mask.shape[0]}.")
        return mask

    def square(self, image: Tensor) -> Tensor:
        """An image as `load` shows it, uint8 (3, S, S): what was cut out is stretched, all else cut in the centre."""
        return resize(image[None], self.image_size)[0] if self.region in CUT_OUT else fit(image, self.image_size)

    def load(self, index: Tensor) -> Tensor:
        """See `Split.load`."""
        return torch.stack([self.square(self.image(i)) for i in index.tolist()])

    def in_memory(self) -> ArraySplit:
        """The same split, decoded once."""
        images = stack(lambda i: self.square(self.image(i)), len(self), "Decoding images")
        masks = None
        if self.region == "full" and self.located:
            masks = stack(self._square_mask, len(self), "Reading masks")
        return ArraySplit(images, self.labels, masks, self.files)

    def _square_mask(self, i: int) -> Tensor:
        mask = self.mask(i, read_image(Path(self.files[i]), self.files[i]))
        return fit(mask[None].byte(), self.image_size, nearest=True)[0].bool()


def imagefolder(
    *,
    root: str,
    train: str | None,
    tests: list[str] | None,
    split: Annotated[float, Field(gt=0, lt=1)],
    boxes: str | None,
    masks: str | None,
    image_size: PositiveInt,
    train_on: TrainOn,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
    shifted: dict[str, str],
    renamed: dict[str, str],
) -> Dataset:
    """Any folder of images with one folder per class, `<root>/<train>/<class>/*.jpg` and so on.

    Args:
        root: the folder.
        train: the folder in it to train on; null is `train` where there is one, else `root` itself.
        tests: the folders in it to test on; null is `val` or else `test` where there is one, else a part of `train`.
        split: the part of each class that is held out where there is no test folder; always the same images.
        boxes: a .csv file with a line per image and the columns wnid (or class), file, xmin, ymin, xmax, ymax in
            pixels, max inclusive, and, as an option, split, the name of the train or test folder.
        masks: a folder with a mask for each image in the place that the image has in `root`; same stem, not black on
            the object.
        image_size: of the short side, in pixels; the centre square is cut.
        train_on: full images or fg, the inside of the object's box (stretched to a square).
        resident_size: images up to this size are decoded once and kept on the training device,
        memory_budget_gb: as long as all of them need no more gigabytes than this.
        shifted: further test splits by name, folders of the same classes shown otherwise (sketches, renditions, other
            places); absolute, or in `root`. What the training folder does not have is left out, so that ImageNet-R
            serves for ImageNet-100; folders that are numbers, as in ImageNetV2, count the classes in order.
        renamed: a class folder in there to the class that it means, where the names differ.

    With boxes or masks each test set is shown as `full`, `fg`, `crop` (as large as `fg`, from anywhere), `only_fg` (the
    rest black), `only_bg` (the object black). `boxes` and `masks` are paths in `root`, or absolute.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"There is no folder {base}; set dataset.root to a folder of images.")
    if boxes is not None and masks is not None:
        raise UserError("dataset.boxes and dataset.masks are both set; keep one and set the other to null.")
    objects = _Objects(base, boxes, masks)
    if train_on == "fg" and not objects.known:
        raise UserError(
            f"dataset.train_on=fg needs to know where the object is; set dataset.boxes or dataset.masks for {base}, "
            "or dataset.train_on=full."
        )

    folder = base / train if train else base / "train" if (base / "train").is_dir() else base
    classes = [path.name for path in _folders(folder) if path != objects.masks]
    if not classes:
        raise UserError(f"{folder} has no class folders; set dataset.root (or dataset.train) to a folder of them.")
    files, labels = _images(folder, classes)
    test_folders = [base / test for test in tests or []]
    if tests is None:
        test_folders = [base / test for test in ("val", "test") if (base / test).is_dir()][:1]
    test_sets = {path.name if tests else "test": _test_images(path, classes) for path in test_folders}
    if not test_sets:
        held_out = _held_out(labels, split, folder, classes)
        test_sets["test"] = (folder, _pick(files, held_out), labels[held_out])
        files, labels = _pick(files, ~held_out), labels[~held_out]

    def files_of(where: Path, chosen: list[str], label: Tensor) -> FileSplit:
        at = objects.of(where, chosen, [classes[k] for k in label.tolist()])
        return FileSplit(chosen, label, image_size, *at)

    return of_files(
        base.resolve().name,
        classes,
        files_of(folder, files, labels),
        {name: files_of(*found) for name, found in test_sets.items()},
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        shifted={
            name: FileSplit(*_shifted_images(name, base / Path(other).expanduser(), classes, renamed), image_size)
            for name, other in shifted.items()
        },
    )


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
) -> Dataset:
    """A data set of image files, trained on what `train_on` says; tests that know the object show every region.

    Small images are decoded now if the budget allows it; see `imagefolder` for the last three.
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
    shown = {key.removeprefix("test "): part for key, part in splits.items() if key != "train"}
    return Dataset(name, classes, train.image_size, splits["train"], shown, mean=mean, std=std, shifted=tuple(shifted))


class _Objects:
    """Where the objects are: in a table of boxes, in a folder of masks, or not known."""

    def __init__(self, base: Path, boxes: str | None, masks: str | None) -> None:
        self.base = base
        self.table = None if boxes is None else _read_boxes(base / boxes)
        self.boxes = boxes
        self.masks = None if masks is None else base / masks
        if self.masks is not None and not self.masks.is_dir():
            raise UserError(f"There is no folder {self.masks}; set dataset.masks to the folder of masks, or to null.")

    @property
    def known(self) -> bool:
        return self.table is not None or self.masks is not None

    def of(self, folder: Path, files: Sequence[str], classes: Sequence[str]) -> tuple[Tensor | None, list[str] | None]:
        """Boxes (N, 4) and mask files (N) of the images, or None for what there is not."""
        if self.table is not None:
            return torch.tensor([self._box(folder, *image) for image in zip(files, classes, strict=True)]), None
        if self.masks is not None:
            return None, [self._mask(file) for file in files]
        return None, None

    def _box(self, folder: Path, file: str, name: str) -> tuple[int, int, int, int]:
        assert self.table is not None
        for split in (folder.name, None):
            if box := self.table.get((split, name, Path(file).name)):
                return box
        raise UserError(f"{self.boxes} has no box for {file} (split {folder.name}, class {name}); add one.")

    def _mask(self, file: str) -> str:
        assert self.masks is not None
        place = self.masks / Path(file).relative_to(self.base)
        for suffix in (".png", *IMG_EXTENSIONS):
            if (mask := place.with_suffix(suffix)).is_file():
                return str(mask)
        raise UserError(f"{file} has no mask {place.with_suffix('.png')}; add one.")


def _read_boxes(path: Path) -> dict[tuple[str | None, str, str], tuple[int, int, int, int]]:
    if not path.is_file():
        raise UserError(f"There is no file {path}; set dataset.boxes to the .csv file of boxes, or to null.")
    table = {}
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        columns = set(rows.fieldnames or [])
        name = "wnid" if "wnid" in columns else "class"
        missing = {name, "file", "xmin", "ymin", "xmax", "ymax"} - columns
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(sorted(missing))}; "
                "needed are wnid (or class), file, xmin, ymin, xmax, ymax."
            )
        for row in rows:
            try:
                x0, y0, x1, y1 = (int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            except (TypeError, ValueError):
                x0, y0, x1, y1 = 0, 0, -1, -1
            if not (0 <= x0 <= x1 and 0 <= y0 <= y1):
                raise UserError(
                    f"Line {rows.line_num} of {path} is no box: xmin, ymin, xmax, ymax must be integers with "
                    "0 <= xmin <= xmax and 0 <= ymin <= ymax."
                )
            table[row.get("split"), row[name], row["file"]] = (x0, y0, x1 + 1, y1 + 1)
    return table


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"There is no folder {path}; dataset.train and dataset.tests name folders in dataset.root.")
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(folder: Path, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """The files of the class folders in order, and their labels (N,); a test folder may lack classes."""
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _files(folder / name)
        if not found and (folder / name).is_dir():
            raise UserError(f"{folder / name} has no images ({', '.join(IMG_EXTENSIONS)}); add some or remove it.")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{folder} has no class folders; it needs {folder.name}/{classes[0]}/ and so on.")
    return files, torch.tensor(labels)


def _test_images(folder: Path, classes: Sequence[str]) -> tuple[Path, list[str], Tensor]:
    unknown = [path for path in _folders(folder) if path.name not in classes]
    if unknown:
        raise UserError(
            f"{unknown[0]} is no class of the training folder, which has {', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}; rename or remove it."
        )
    return folder, *_images(folder, classes)


def _shifted_images(
    name: str, folder: Path, classes: Sequence[str], renamed: dict[str, str]
) -> tuple[list[str], Tensor]:
    """The files of those class folders that are classes of the training folder, and their labels (N,)."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set dataset.shifted.{name} to a folder of class folders.")
    wrong = [target for target in renamed.values() if target not in classes]
    if wrong:
        raise UserError(f"dataset.renamed leads to {wrong[0]}, which is no class; {suggestion(wrong[0], classes)}")
    found = _folders(folder)
    if all(path.name.isdigit() for path in found) and not all(name.isdigit() for name in classes):
        if len(found) != len(classes):
            raise UserError(
                f"{folder} has {len(found)} numbered classes and the training folder {len(classes)}, so they cannot be "
                "counted off; name its folders as the training classes."
            )
        meant = dict(zip(sorted(found, key=lambda path: int(path.name)), classes, strict=True))
    else:
        meant = {path: renamed.get(path.name, path.name) for path in found}
    files: list[str] = []
    labels: list[int] = []
    for path, target in meant.items():
        if target in classes:
            images = _files(path)
            files += images
            labels += [classes.index(target)] * len(images)
    if not files:
        raise UserError(
            f"{folder} has no images of a class of the training folder, {', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}; set dataset.shifted.{name} to another folder, or say with "
            "+dataset.renamed.<its folder>=<class> what is what."
        )
    return files, torch.tensor(labels)


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )


def _held_out(labels: Tensor, part: float, folder: Path, classes: Sequence[str]) -> Tensor:
    """Bool (N,): the same `part` of every class, at least one image of it, on every call."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for k, name in enumerate(classes):
        members = (labels == k).nonzero()[:, 0]
        count = max(1, round(part * len(members)))
        if count >= len(members):
            raise UserError(
                f"{folder / name} has {len(members)} images, too few to hold out a part of {part}; "
                "add images or set dataset.split lower."
            )
        chosen[members[permutation(0, 0, len(members))[:count]]] = True
    return chosen


def _pick(files: Sequence[str], chosen: Tensor) -> list[str]:
    return [files[i] for i in chosen.nonzero()[:, 0].tolist()]
