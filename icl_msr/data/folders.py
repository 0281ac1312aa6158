"""Folders of images with one folder per class, with boxes or masks of the objects as an option."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import permutation
from icl_msr.core.storage import expanded
from icl_msr.data.classes import ImageClasses, chosen_classes, listed_classes
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.listing import SUFFIXES, Listing, is_number
from icl_msr.data.objects import BoxesOf, Objects
from icl_msr.data.sources import MaskValues, TrainOn, require_resize
from icl_msr.data.unlabelled import unlabelled_files

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training", "trainset", "train_set", "training_set"),
    "val": ("val", "valid", "validation", "valset", "val_set", "validation_set"),
    "test": ("test", "testing", "testset", "test_set", "testing_set"),
}
"""Names of the folders in published data sets, in lower case."""


_LIKE_A_SPLIT = re.compile(r"(^|[^a-z])(train|val|valid|test)(ing|idation|set)?([^a-z]|$)", re.IGNORECASE)


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
    classes: str | list[str] | None = None,
    labels: str | None = None,
    boxes_of: BoxesOf = "refuse",
    mask_values: MaskValues = None,
    follow_links: bool = False,
    corrupted: str | None = None,
    extra: str | list[str] | None = None,
    resize: PositiveInt | None = None,
) -> Dataset:
    """Build a data set from a folder of images with one folder per class, `<root>/<train>/<class>/*.jpg` and so on.

    Args:
        root: the folder.
        train: the folder in `root` to train on. Null takes `train` (or `Train`, `training`) if it exists, else `root`.
        tests: the folders in `root` to test on. Null takes `val` (or `valid`), else `test`, else a part of `train`.
            Folders with the same last name are named by the part of the path that differs.
        split: the fraction of each class that is held out if there is no test folder. It is always the same images.
        boxes: a .csv file with a line per image and the columns wnid (or class), file, xmin, ymin, xmax, ymax in
            pixels, max inclusive. The optional column split has the name of the train or test folder. The column file
            has the path below the class folder, or only the last name if it is unique.
        masks: a folder with a mask for each image, at the image's path in `root`. The mask has the same stem and is not
            black on the object.
        image_size: length of the short side, in pixels. The centre square is cut.
        resize: length of the short side in pixels, before the centre square of an image that is not augmented is cut
            out; 256 for 224 in the usual protocol of probes. Null takes `image_size`. Views are cut from whole images.
        train_on: `full` images, or `fg`, the inside of the object's box stretched to a square.
        resident_size: images up to this size, in pixels, are decoded once and kept on the training device.
        memory_budget_gb: the most memory that these may need, in gigabytes. Above it, workers decode in every epoch.
        shifted: further test splits by name: absolute folders, or folders in `root`, that show the same classes in
            another way, such as sketches. Classes that the training folder lacks are left out, so ImageNet-R serves
            for ImageNet-100. Folders named by numbers, as in ImageNetV2, count the classes in order.
        renamed: a mapping from the class folders of `shifted` to classes, for those whose names differ.
        classes: the classes to use, in this order: a list, a text file with one per line, or `imagenet100`. Null takes
            all.
        labels: a file with the class of each image of test folders without class folders, as published with ImageNet
            and Tiny-ImageNet (see `classes.ImageClasses`). Null searches the published places.
        boxes_of: the treatment of several boxes of one image: refuse, largest or union.
        mask_values: the values of a mask that are the object: a list, trimap (1) or voc (1 to 254). Null takes all but
            0.
        follow_links: true also reads links to places outside `root`.
        corrupted: the folder of ImageNet-C, `<corruption>/<severity>/<class>`. Each corruption and severity is a test
            split, such as `fog_3`.
        extra: further training images without labels, of any depth: a folder, a text file of paths, or a list of these.

    With boxes or masks, each test set is shown as `full`, `fg`, `crop` (as large as `fg`, from a random place),
    `only_fg` (the rest black) and `only_bg` (the object black). `boxes` and `masks` are paths in `root`, or absolute.

    Raises:
        UserError: a folder or file is missing or empty, or the folders, boxes or masks do not fit together.
    """
    base = expanded(root)
    if not base.is_dir():
        raise UserError(f"There is no folder {base}; set dataset.root to a folder of images.")
    require_resize(resize, image_size)
    if resize is not None and (boxes or masks or image_size <= resident_size):
        raise UserError(
            "dataset.resize is for photographs without boxes or masks that are decoded in training; type "
            "dataset.resize=null, or drop the boxes and masks and type dataset.resident_size=0."
        )
    objects = Objects(base, boxes, masks, boxes_of, follow_links=follow_links)
    if train_on == "fg" and not objects.known:
        raise UserError(
            f"dataset.train_on=fg needs to know where the object is; set dataset.boxes or dataset.masks for {base}, "
            "or dataset.train_on=full."
        )
    listing = Listing(base, follow_links=follow_links)
    roots = [] if extra is None else [base / expanded(part) for part in _list(extra)]
    elsewhere = [*shifted.values(), *([corrupted] if corrupted else [])]
    read_elsewhere = [*roots, *(base / expanded(path) for path in elsewhere)]
    read_elsewhere += [objects.masks] if objects.masks else []
    layout = _layout(listing, train, tests, read_elsewhere)
    trained = _class_folders(listing, layout.train, objects.masks)
    names = chosen_classes(listed_classes(classes, base), list(trained), layout.train)
    flat = ImageClasses(base, labels, list(trained), names)
    train_set = _images(listing, layout.train, {name: trained[name] for name in names})
    test_sets = {
        name: _test_images(listing, path, names, flat, partly=classes is not None)
        for name, path in layout.tests.items()
    }
    if not test_sets:
        held_out = _held_out(train_set.labels, split, layout.train, names)
        test_sets["test"], train_set = train_set.part(held_out), train_set.part(~held_out)
    last = [path.name for path in (layout.train, *layout.tests.values())]

    def files_of(found: _Found) -> FileSplit:
        spelled = [_relative(found.folder, base), *([found.folder.name] if last.count(found.folder.name) == 1 else [])]
        at = objects.of(spelled, found.files, [names[k] for k in found.labels.tolist()], found.places)
        return FileSplit(found.files, found.labels, image_size, *at, mask_values=mask_values, resize=resize)

    published = {} if corrupted is None else _corrupted(listing, base / expanded(corrupted))
    if twice := next(iter(shifted.keys() & published.keys()), None):
        raise UserError(f"dataset.shifted.{twice} is a split of dataset.corrupted too; give it another name.")
    whole = files_of(train_set)
    more: list[str] = []
    if extra is not None:
        if train_on == "fg":
            raise UserError("dataset.extra has no boxes or masks, which dataset.train_on=fg needs; drop one of them.")
        files, more = unlabelled_files(roots, follow_links=follow_links)
        labels_of = torch.cat([train_set.labels, torch.full((len(files),), -1)])
        whole = FileSplit([*train_set.files, *files], labels_of, image_size, resize=resize)
    splits = whole, {name: files_of(found) for name, found in test_sets.items()}
    others = {}
    for name, other in {**shifted, **published}.items():
        found, said = _shifted_images(listing, name, base / expanded(other), names, renamed)
        others[name] = FileSplit(*found, image_size, resize=resize)
        more += said if name in shifted else []
    left_out = len(trained) - len(names)
    notes = [
        *layout.notes,
        *flat.notes,
        *more,
        f"{left_out} class folders of {layout.train} are not in dataset.classes and are left out." if left_out else "",
        listing.sentence,
        objects.sentence,
    ]
    return of_files(
        base.resolve().name,
        names,
        *splits,
        train_on,
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        shifted=others,
        notes=[note for note in notes if note],
    )


@dataclass
class _Found:
    """The images of a folder of class folders."""

    folder: Path
    files: list[str]
    labels: Tensor
    """Labels, (N,) int64."""
    places: list[str]
    """The path of each image below its class folder."""

    def part(self, chosen: Tensor) -> "_Found":
        """Return the images for which `chosen` (N,) is true."""
        index = chosen.nonzero()[:, 0].tolist()
        return _Found(self.folder, [self.files[i] for i in index], self.labels[chosen], [self.places[i] for i in index])


@dataclass
class _Layout:
    """The training folder and the test folders."""

    train: Path
    tests: Mapping[str, Path]
    """Folders by the name of the split; empty if a part of `train` is held out."""
    notes: list[str]


def _layout(listing: Listing, train: str | None, tests: list[str] | None, read_elsewhere: Sequence[Path]) -> _Layout:
    """Return the folders that the keys name, or else those with the usual names."""
    base = listing.root
    children = listing.folders(base)
    spelled = {kind: _spelled(children, kind) for kind in SPELLINGS}
    others = [path for path in children if path not in (*spelled.values(), *read_elsewhere)]
    folder = base / train if train else base
    if train is None and (found := spelled["train"]) and (not others or listing.folders(found)):
        folder = found
    elif train is None:
        _refuse_splits_as_classes(listing, children, spelled, tests)
    whole = folder.resolve() == base.resolve()
    if tests is not None:
        named = _named(base, tests)
        if inside := next((path for path in named.values() if path.resolve().is_relative_to(folder.resolve())), None):
            raise UserError(
                f"The test folder {inside} lies in the training folder {folder}; set dataset.train to another folder."
            )
    else:
        test = next((spelled[kind] for kind in ("val", "test") if spelled[kind]), None)
        named = {} if test is None or whole else {"test": test}
    read = (folder, *named.values(), *read_elsewhere)
    unread = [] if train or whole else [path for path in children if not any(_holds(path, other) for other in read)]
    return _Layout(folder, named, _unread(base, unread))


def _holds(folder: Path, other: Path) -> bool:
    return other.resolve().is_relative_to(folder.resolve())


def _spelled(folders: Sequence[Path], kind: str) -> Path | None:
    found = [path for path in folders if path.name.lower() in SPELLINGS[kind]]
    if len(found) > 1:
        raise UserError(
            f"{found[0]} and {found[1]} are both called {kind}; set dataset.train and dataset.tests to the right ones."
        )
    return found[0] if found else None


def _refuse_splits_as_classes(
    listing: Listing, children: Sequence[Path], spelled: Mapping[str, Path | None], tests: list[str] | None
) -> None:
    """Check that the folders of a root look like classes, by their names and by their own folders."""
    hollow = [path for path in children if not listing.here(path)]
    way_out = "set dataset.train and dataset.tests to folders in it, or dataset.train=. where they are classes"
    wrong = next((path for kind in ("val", "test") if (path := spelled[kind])), None)
    if wrong is not None and tests is None and listing.folders(wrong):
        raise UserError(f"{listing.root} has a folder {wrong.name} and no training folder; {way_out}.")
    inner = [{path.name for path in listing.folders(child)} for child in children]
    shared = set.intersection(*inner) if len(inner) > 1 else set()
    if len(shared) > 1 and len(hollow) == len(children):
        raise UserError(
            f"{listing.root} has the folders {_some([path.name for path in children])}, and each of them has the "
            f"folders {_some(sorted(shared))}, so they look like splits and not like classes; {way_out}."
        )
    if len(children) == 1 and hollow and _spelled(listing.folders(children[0]), "train"):
        raise UserError(f"{children[0]} holds the training folder; set dataset.root={children[0]}.")
    if like := next((path for path in hollow if _LIKE_A_SPLIT.search(path.name) and listing.folders(path)), None):
        raise UserError(f"{like} has folders of its own and the name of a split, not of a class; {way_out}.")


def _unread(base: Path, folders: Sequence[Path]) -> list[str]:
    if not folders:
        return []
    return [
        f"{_some([path.name for path in folders])} in {base} {'is' if len(folders) == 1 else 'are'} not read; "
        "dataset.tests and dataset.extra name what is read."
    ]


def _named(base: Path, tests: Sequence[str]) -> dict[str, Path]:
    """Return test folders by the name of their split: the last name, or the part that differs if last names agree."""
    if not tests:
        raise UserError("dataset.tests is an empty list; name folders in it, or set it to null.")
    paths = [base / test for test in tests]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"There is no folder {path}; dataset.train and dataset.tests name folders in dataset.root.")
    parts = [path.resolve().parts for path in paths]
    twice = next((path for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1), None)
    if twice is not None:
        raise UserError(f"dataset.tests names {twice} twice; name it once.")
    names = [own[-1] for own in parts]
    if len(set(names)) < len(names):
        alike = next(n for n in range(1, 99) if len({own[-n:] for own in parts}) > 1) - 1
        shorter = [own[: len(own) - alike] for own in parts]
        names = [own[-1] for own in shorter]
        if len(set(names)) < len(names):
            above = next(n for n in range(99) if len({own[n : n + 1] for own in shorter}) > 1)
            names = ["-".join(own[above:]) for own in shorter]
    return dict(zip(names, paths, strict=True))


def _class_folders(listing: Listing, folder: Path, masks: Path | None = None) -> dict[str, Path]:
    """Return the class folders by the names of the classes, in order."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; dataset.train and dataset.tests name folders in dataset.root.")
    found: dict[str, Path] = {}
    for path in listing.folders(folder):
        name = normalize("NFC", path.name)
        if name in found:
            raise UserError(
                f"{folder} has two folders whose names look alike, {name}: their accents are written in two forms of "
                "Unicode; rename one of them, or join them."
            )
        if path != masks:
            found[name] = path
    if len(found) == 1 and not listing.here(only := next(iter(found.values()))) and len(listing.folders(only)) > 1:
        inner = _some([path.name for path in listing.folders(only)])
        raise UserError(
            f"{folder} has one folder, {only.name}, and this one has the folders {inner}; set "
            f"dataset.train={_relative(only, listing.root)}, and dataset.tests alike."
        )
    if not found:
        raise UserError(
            f"{folder} has no class folders; set dataset.root (or dataset.train) to a folder of them, or read images "
            f"without labels with dataset=images dataset.root={folder}. {listing.sentence}".rstrip()
        )
    return found


def _images(listing: Listing, folder: Path, classes: Mapping[str, Path]) -> _Found:
    """Return the images of the class folders, in order. A label is the position in `classes`."""
    files: list[str] = []
    labels: list[int] = []
    places: list[str] = []
    for label, path in enumerate(classes.values()):
        found = listing.below(path)
        if not found:
            raise UserError(
                f"{path} has no images ({', '.join(SUFFIXES)}); add some or remove it. {listing.sentence}".rstrip()
            )
        files += found
        labels += [label] * len(found)
        places += [_relative(Path(file), path) for file in found]
    listing.beside(folder)
    return _Found(folder, files, torch.tensor(labels), places)


def _test_images(listing: Listing, folder: Path, classes: Sequence[str], flat: ImageClasses, *, partly: bool) -> _Found:
    """Return the images of a test folder. It may lack classes. With `partly`, folders of other classes are left out."""
    if flat.covers(listing, folder):
        return _Found(folder, *flat.read(listing, folder))
    found = _class_folders(listing, folder)
    unknown = [path for name, path in found.items() if name not in classes]
    if unknown and not partly:
        raise UserError(
            f"{unknown[0]} is not a class of the training folder, which has {_some(classes)}; rename or remove it."
        )
    if len(unknown) == len(found):
        raise UserError(f"{folder} has no folder of a class, {_some(classes)}; rename its folders.")
    there = [name for name in classes if name in found]
    images = _images(listing, folder, {name: found[name] for name in there})
    return replace(images, labels=torch.tensor([classes.index(name) for name in there])[images.labels])


def _shifted_images(
    listing: Listing, name: str, folder: Path, classes: Sequence[str], renamed: dict[str, str]
) -> tuple[tuple[list[str], Tensor], list[str]]:
    """Return the files in the folders of training classes with their labels (N,), and remarks for the user."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set dataset.shifted.{name} to a folder of class folders.")
    wrong = [target for target in renamed.values() if target not in classes]
    if wrong:
        raise UserError(f"dataset.renamed leads to {wrong[0]}, which is not a class; {suggestion(wrong[0], classes)}")
    listing = Listing(folder, follow_links=listing.follow_links)
    found = listing.folders(folder)
    if all(is_number(path.name) for path in found) and not all(is_number(name) for name in classes):
        if len(found) != len(classes):
            raise UserError(
                f"{folder} has {len(found)} numbered classes and the training folder {len(classes)}, so they cannot be "
                "matched by number; name its folders as the training classes."
            )
        meant = dict(zip(sorted(found, key=lambda path: int(path.name)), classes, strict=True))
    else:
        meant = {path: renamed.get(path.name, normalize("NFC", path.name)) for path in found}
    files: list[str] = []
    labels: list[int] = []
    for path, target in meant.items():
        if target in classes:
            images = listing.below(path)
            files += images
            labels += [classes.index(target)] * len(images)
    if not files:
        raise UserError(
            f"{folder} has no images of a class of the training folder, {_some(classes)}; set dataset.shifted.{name} "
            "to another folder, or name its classes with +dataset.renamed.<its folder>=<class>."
        )
    unknown = [path.name for path, target in meant.items() if target not in classes]
    said = [f"{_some(unknown)} in {folder} are not training classes and are left out."] if unknown else []
    return (files, torch.tensor(labels)), [*said, *([listing.sentence] if listing.sentence else [])]


def _corrupted(listing: Listing, folder: Path) -> dict[str, str]:
    """Return the folders of ImageNet-C by the names of the splits. Corruptions may lie in folders of four kinds."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set dataset.corrupted to ImageNet-C, or to null.")
    found: dict[str, str] = {}
    listing = Listing(folder, follow_links=listing.follow_links)
    for path in listing.folders(folder):
        inner = listing.folders(path)
        corruptions = [path] if any(is_number(inside.name) for inside in inner) else inner
        for corruption in corruptions:
            for severity in listing.folders(corruption):
                name = f"{corruption.name}_{severity.name}"
                if name in found:
                    raise UserError(f"{folder} has the corruption {name} twice; take one of them away.")
                found[name] = str(severity.resolve())
    if not all(is_number(name.rpartition("_")[2]) for name in found) or not found:
        raise UserError(
            f"{folder} has no <corruption>/<severity>/<class> folders; set dataset.corrupted to ImageNet-C."
        )
    return found


def _held_out(labels: Tensor, part: float, folder: Path, classes: Sequence[str]) -> Tensor:
    """Return bool (N,): the same `part` of every class on every call, at least one image of each."""
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


def _list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _relative(path: Path, base: Path) -> str:
    """Return the path below the base, with `/`; the whole path if it lies elsewhere."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
