"""The classes of a data set, and the classes of test images without class folders, from published files."""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import torch
from torch import Tensor

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded, readable
from icl_msr.data.listing import Listing, is_number

LISTS = Path(__file__).parent / "lists"
"""The class lists that come with the package."""

_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
_PUBLISHED = ("LOC_val_solution.csv", _DEVKIT, f"data/{_DEVKIT}", f"ILSVRC2012_devkit_t12/data/{_DEVKIT}")


def listed_classes(classes: str | list[str] | None, base: Path) -> list[str] | None:
    """Return the classes of `dataset.classes`: a list, a text file, or the name of a list in this package.

    A line of a file begins with the name of a class. The rest after a space or a comma is ignored, as are lines that
    begin with #.

    Raises:
        UserError: there is no such file, or a class is named twice.
    """
    if classes is None:
        return None
    names = classes
    if isinstance(classes, str):
        known = [path.stem for path in LISTS.glob("*.txt")]
        path = next((p for p in (base / classes, expanded(classes)) if p.is_file()), LISTS / f"{classes}.txt")
        if not path.is_file():
            raise UserError(f"There is no file {classes} for dataset.classes; {suggestion(classes, known)}")
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = [re.split(r"[\s,]", line.strip())[0] for line in lines if line.strip() and not line.startswith("#")]
    assert not isinstance(names, str)
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None or not names:
        raise UserError(f"dataset.classes names {f'{twice} twice' if names else 'no class'}; name each class once.")
    return [normalize("NFC", name) for name in names]


def chosen_classes(listed: list[str] | None, there: list[str], folder: Path) -> list[str]:
    """Return the classes in the order of the labels: the listed ones, or all that exist.

    Raises:
        UserError: a listed class does not exist.
    """
    for name in listed or ():
        if name not in there:
            raise UserError(
                f"dataset.classes names {name}, which is not a folder of {folder}; {suggestion(name, there)}"
            )
    return there if listed is None else listed


class ImageClasses:
    """The classes of the images of a test folder that has no class folders.

    They are read from Tiny-ImageNet's `val_annotations.txt`, ImageNet's `LOC_val_solution.csv`,
    `ILSVRC2012_validation_ground_truth.txt` (with the devkit's `meta.mat` beside it), or a text file. Each line of a
    text file holds the name of an image and its class. The name is the path below the folder, or its last part if this
    is unique, with or without the suffix. The class is a name or, from 0, a number among all training folders.

    Args:
        base: the folder of the data set.
        file: the file of classes, absolute or in `base`. None searches the published places.
        there: all training class folders, in order.
        classes: the classes in the order of the labels. Images of other classes are left out.
    """

    def __init__(self, base: Path, file: str | None, there: Sequence[str], classes: Sequence[str]) -> None:
        self.base, self.file, self.there, self.classes = base, file, there, classes
        self.notes: list[str] = []
        """Sentences about images that are left out."""

    def covers(self, listing: Listing, folder: Path) -> bool:
        """Return whether the folder holds images and no class folders."""
        return (
            folder.is_dir()
            and all(path.name == "images" for path in listing.folders(folder))
            and bool(listing.here(folder) or listing.below(folder))
        )

    def read(self, listing: Listing, folder: Path) -> tuple[list[str], Tensor, list[str]]:
        """Return the files (N), their labels (N,) and their paths below the folder (N).

        Raises:
            UserError: there is no file of classes, an image is missing in it, or a line fits several images.
        """
        files = listing.below(folder)
        places = [Path(file).relative_to(folder).as_posix() for file in files]
        path = self._path(folder)
        table = self._table(path, places)
        times = Counter(name for place in places for name in set(_names(folder.name, place)))
        chosen, labels = [], []
        for file, place in zip(files, places, strict=True):
            known = next((name for name in _names(folder.name, place) if name in table), None)
            if known is None:
                raise UserError(f"{path} has no class for {file}; add one, or remove the image.")
            if known not in (place, f"{folder.name}/{place}") and times[known] > 1:
                raise UserError(
                    f"{path} names {known}, and {folder} has several images of that name; write their paths, as in "
                    f"{place}."
                )
            name = table[known]
            if name in self.classes:
                chosen.append(file)
                labels.append(self.classes.index(name))
        if not chosen:
            raise UserError(f"{path} names no image of {folder} whose class is one of {', '.join(self.classes[:5])}.")
        if len(chosen) < len(files):
            left = len(files) - len(chosen)
            self.notes.append(f"{left} images of {folder} are of other classes by {path} and are left out.")
        return chosen, torch.tensor(labels), [Path(file).relative_to(folder).as_posix() for file in chosen]

    def _path(self, folder: Path) -> Path:
        names = [folder / f"{folder.name}_annotations.txt", *(self.base / name for name in _PUBLISHED)]
        names += [self.base / f"{folder.name}.txt"]
        if self.file is not None:
            names = [self.base / expanded(self.file)]
        found = next((path for path in names if path.is_file()), None)
        if found is None:
            looked = f"There is no file {names[0]}" if self.file else f"{folder} has no class folders"
            raise UserError(
                f"{looked}; set dataset.labels to a file that names the class of each of its images, or move the "
                "images into class folders."
            )
        return found

    def _table(self, path: Path, places: Sequence[str]) -> Mapping[str, str]:
        """Return the class of each image, by the name that the file gives it."""
        lines = [line for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()]
        if all(is_number(line.strip()) for line in lines):
            return self._numbered(path, [int(line) for line in lines], places)
        with readable(path, "correct it"):
            rows = list(csv.reader(lines)) if path.suffix == ".csv" else [line.split() for line in lines]
        if path.suffix == ".csv":
            rows = [[row[0], *row[1].split()] for row in rows[1:] if len(row) > 1]
        wrong = next((row for row in rows if len(row) < 2), None)
        if wrong is not None:
            raise UserError(f"A line of {path} is not the name of a file and its class: {' '.join(wrong)}.")
        table: dict[str, str] = {}
        for row in rows:
            name = self._name(path, row[1])
            image = PurePosixPath(row[0].replace("\\", "/")).as_posix()
            if table.setdefault(image, name) != name:
                raise UserError(f"{path} gives {image} the classes {table[image]} and {name}; keep one line.")
        return table

    def _name(self, path: Path, word: str) -> str:
        if word.isdecimal() and word not in self.there:
            if not is_number(word) or int(word) >= len(self.there):
                raise UserError(
                    f"{path} has the class {word:.30}, and the {len(self.there)} training folders count from 0; name "
                    "classes by their folders."
                )
            return self.there[int(word)]
        return normalize("NFC", word)

    def _numbered(self, path: Path, numbers: Sequence[int], places: Sequence[str]) -> Mapping[str, str]:
        """Return the classes in ImageNet's ground truth, which has a number for each image in the order of names."""
        meta = path.with_name("meta.mat")
        if not meta.is_file():
            raise UserError(f"{path} numbers the classes as meta.mat of ImageNet's devkit does; put {meta} beside it.")
        from scipy.io import loadmat

        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in loadmat(meta, squeeze_me=True)["synsets"]}
        if len(numbers) != len(places):
            raise UserError(f"{path} has {len(numbers)} lines for {len(places)} images; both must be complete.")
        unknown = next((number for number in numbers if number not in synsets), None)
        if unknown is not None:
            raise UserError(f"{path} has the class {unknown}, which {meta} does not list.")
        return {place: synsets[number] for place, number in zip(places, numbers, strict=True)}


def _names(folder: str, place: str) -> list[str]:
    """Return the names by which a file of classes may call an image, the most exact one first."""
    inside = place.removeprefix("images/")
    paths = [PurePosixPath(*parts) for parts in ((place,), (inside,), (folder, place), (inside.rpartition("/")[2],))]
    return [name.as_posix() for path in paths for name in (path, path.with_suffix(""))]
