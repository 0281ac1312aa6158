"""Folders of images without labels, for pre-training. Evaluation can use another, labelled data set."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from icl_msr.core.compose import compose
from icl_msr.core.config import build, check_node, config_dir, suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import permutation
from icl_msr.core.storage import expanded
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.listing import SUFFIXES, Listing


def images(
    *,
    root: str | Annotated[list[str], Field(min_length=1)],
    split: Annotated[float, Field(gt=0, lt=1)],
    labelled: str | dict[str, Any] | None,
    image_size: PositiveInt,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
    follow_links: bool,
) -> Dataset:
    """Build a data set of all images of a folder, at any depth, without labels.

    Args:
        root: a folder, a text file with the path of an image per line, or a list of these. Paths in a text file are
            absolute, or relative to the file's folder.
        split: the fraction of the images that is held out to measure the representation on, always the same images. It
            is not used with `labelled`.
        labelled: the data set that evaluation and the online monitors use: the name of a choice of `dataset`, or a
            mapping with its `_target_` and keys.
        image_size: length of the short side, in pixels. The centre square is cut.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.
        follow_links: true also reads links to places outside `root`.

        Raises:
            UserError: there are too few images, or the labelled data set cannot be used.
    """
    roots = [expanded(part) for part in ([root] if isinstance(root, str) else root)]
    files, notes = unlabelled_files(roots, follow_links=follow_links)
    name = roots[0].resolve().stem if len(roots) == 1 else f"{roots[0].resolve().stem} and {len(roots) - 1} more"
    measured = None if labelled is None else labelled_set(labelled, image_size)
    held: list[str] = []
    if measured is None:
        chosen = set(permutation(0, 0, len(files))[: max(1, round(split * len(files)))].tolist())
        held = [file for i, file in enumerate(files) if i in chosen]
        files = [file for i, file in enumerate(files) if i not in chosen]
        if len(files) < 2:
            raise UserError(f"{name} has {len(files) + len(held)} images, too few to train on; add some.")
        notes = [
            f"{name} has no labels, so the run reports what needs none; dataset.labelled names a set that has.",
            *notes,
        ]
    data = of_files(
        name,
        (),
        _without_labels(files, image_size),
        {"held_out": _without_labels(held, image_size)} if held else {},
        "full",
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
        notes=notes,
    )
    if measured is None:
        return data
    return replace(data, labelled=replace(measured, mean=data.mean, std=data.std))


def unlabelled_files(roots: Sequence[Path], *, follow_links: bool) -> tuple[list[str], list[str]]:
    """Return the image files of folders and of text files of paths, each once, and remarks for the user.

    Raises:
        UserError: a folder or file does not exist or names no image.
    """
    files: list[str] = []
    notes: list[str] = []
    for root in roots:
        if root.is_dir():
            listing = Listing(root, follow_links=follow_links)
            found = listing.below(root)
            notes += [listing.sentence] if listing.sentence else []
        elif root.is_file() and root.suffix.lower() not in SUFFIXES:
            found = _listed(root)
        else:
            raise UserError(f"There is no folder {root}; name a folder of images, or a text file of their paths.")
        if not found:
            raise UserError(f"{root} has no images ({', '.join(SUFFIXES)}). {notes[-1] if notes else ''}".rstrip())
        files += found
    once = {os.path.abspath(file): file for file in files}
    if len(once) < len(files):
        notes.append(f"{len(files) - len(once)} images are named more than once and read once.")
    return list(once.values()), notes


def labelled_set(labelled: str | Mapping[str, Any] | Dataset, image_size: int) -> Dataset:
    """Return the labelled data set. Build it if `labelled` is a choice of the group `dataset` or a mapping.

    Raises:
        UserError: the choice does not exist, a key is wrong, or the set has no classes or another image size.
    """
    data: Any = labelled
    if not isinstance(labelled, Dataset):
        node = _choice(labelled, image_size) if isinstance(labelled, str) else dict(labelled)
        check_node("dataset.labelled", node)
        data = build(node)
    if not isinstance(data, Dataset) or not data.classified:
        raise UserError("dataset.labelled names no data set of two or more classes; choose one that has labels.")
    if data.image_size != image_size:
        raise UserError(
            f"The images of dataset.labelled have {data.image_size} pixels and those that are trained on {image_size}; "
            f"set dataset.image_size={data.image_size}, or the image_size of dataset.labelled to {image_size}."
        )
    return data


def _choice(name: str, image_size: int) -> dict[str, Any]:
    known = sorted(path.stem for path in (config_dir() / "dataset").glob("*.yaml"))
    try:
        node = compose([f"dataset={name}"]).dataset
    except HydraException:
        raise UserError(f"dataset.labelled={name} is not a choice of dataset; {suggestion(name, known)}") from None
    if missing := sorted(key.removeprefix("dataset.") for key in OmegaConf.missing_keys(node)):
        raise UserError(
            f"dataset.labelled={name} needs the key {missing[0]}; type +dataset@dataset.labelled={name} "
            f"dataset.labelled.{missing[0]}=<value> instead."
        )
    plain = OmegaConf.to_container(node, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()} | (
        {"image_size": image_size} if "image_size" in plain else {}
    )


def _without_labels(files: Sequence[str], image_size: int) -> FileSplit:
    return FileSplit(files, torch.full((len(files),), -1), image_size)


def _listed(path: Path) -> list[str]:
    """Return the paths in a text file, one per line."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a text file of paths of images.") from None
    files = [str(path.parent / line.strip()) for line in lines if line.strip()]
    absent = next((file for file in files if not os.path.isfile(file)), None)
    if absent is not None:
        raise UserError(f"There is no image {absent}, which {path} names; correct it or take it out.")
    return files
