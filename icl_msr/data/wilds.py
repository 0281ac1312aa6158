"""Images in a table of classes, groups and splits: Waterbirds and CelebA as WILDS has them, or a table of your own.

Sagawa et al., Distributionally robust neural networks for group shifts, ICLR 2020, made both sets: the class agrees
with an attribute in most training images, with the background of a bird, or with the sex of a blond person. Koh et al.,
WILDS, ICML 2021, publish them as tables.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded, readable
from icl_msr.data.dataset import Attribute, Dataset
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.listing import is_number, named_file

SPLITS = {"0": "train", "1": "val", "2": "test", "train": "train", "val": "val", "test": "test"}
"""Splits by the number, or the name, that a table has for them."""


class Layout(NamedTuple):
    """The tables of a published set, with the names of its columns and values."""

    table: str
    file: str
    label: str
    attribute: str
    split: str
    names: Mapping[str, Mapping[str, str]]
    """The names of values, by column and value."""
    folder: str = ""
    """The folder of the images, in the root."""
    splits: str = ""
    """The table with the column `split`; empty for `table`."""


LAYOUTS = (
    Layout(
        "metadata.csv",
        "img_filename",
        "y",
        "place",
        "split",
        {"y": {"0": "landbird", "1": "waterbird"}, "place": {"0": "land", "1": "water"}},
    ),
    Layout(
        "list_attr_celeba.csv",
        "image_id",
        "Blond_Hair",
        "Male",
        "partition",
        {"Blond_Hair": {"-1": "not blond", "1": "blond"}, "Male": {"-1": "female", "1": "male"}},
        "img_align_celeba",
        "list_eval_partition.csv",
    ),
)
"""Waterbirds and CelebA."""


def wilds(
    *,
    root: str,
    label: str | None,
    attribute: str | None,
    image_size: PositiveInt,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
) -> Dataset:
    """Build a data set from `metadata.csv` (Waterbirds), or the two `.csv` files of CelebA.

    A `metadata.csv` of your own has the columns `img_filename`, a path in `root`; `split`, 0 or train, 1 or val, 2 or
    test; a column of classes; and a column of the attribute that makes groups. The test splits are `test` and `val`.

    Args:
        root: the folder of the table.
        label: the column of classes. Null takes `y`, or `Blond_Hair` of CelebA.
        attribute: the column that makes groups, together with the class. Null takes `place`, or `Male` of CelebA.
        image_size: length of the short side, in pixels. The centre square is cut.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.

    Raises:
        UserError: a file or a column is missing, or a row is not as published.
    """
    base = expanded(root)
    layout = next((layout for layout in LAYOUTS if (base / layout.table).is_file()), None)
    if layout is None:
        tables = " or ".join(layout.table for layout in LAYOUTS)
        raise UserError(f"{base} has no {tables}; set dataset.root to the folder that has one.")
    layout = layout._replace(label=label or layout.label, attribute=attribute or layout.attribute)
    table = base / layout.table
    wanted = [layout.file, layout.label, layout.attribute]
    rows = _rows(table, [*wanted, *([] if layout.splits else [layout.split])])
    splits = rows
    if layout.splits:
        splits = _rows(base / layout.splits, [layout.file, layout.split])
        if [row[layout.file] for row in splits] != [row[layout.file] for row in rows]:
            raise UserError(
                f"{base / layout.splits} does not list the images of {table}; put the published tables there."
            )
    numbered = {column: _numbered(rows, column, layout) for column in (layout.label, layout.attribute)}
    (classes, labels), (values, of) = numbered[layout.label], numbered[layout.attribute]
    part = [SPLITS.get(row[layout.split]) for row in splits]
    if None in part:
        wrong = splits[part.index(None)]
        raise UserError(
            f"{base / (layout.splits or layout.table)} has the split {wrong[layout.split]} for {wrong[layout.file]}; "
            "write 0, 1 or 2, for train, val and test."
        )
    index = {name: torch.tensor([i for i, own in enumerate(part) if own == name]) for name in ("train", "test", "val")}
    index = {name: chosen for name, chosen in index.items() if len(chosen) or name != "val"}
    if empty := next((name for name, chosen in index.items() if not len(chosen)), None):
        raise UserError(f"{table} has no {empty} images; correct the column {layout.split}.")
    files = [named_file(base / layout.folder, row[layout.file], table) for row in rows]
    found = {
        name: FileSplit([files[i] for i in chosen.tolist()], labels[chosen], image_size)
        for name, chosen in index.items()
    }
    dataset = of_files(
        base.resolve().name,
        classes,
        found.pop("train"),
        found,
        "full",
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
    )
    groups = Attribute(layout.attribute, values, {name: of[chosen] for name, chosen in index.items()})
    return replace(dataset, attribute=groups)


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a table, checked to have these columns and no empty value in them."""
    if not path.is_file():
        raise UserError(f"There is no file {path}; set dataset.root to the folder as it was unpacked.")
    with readable(path, "correct it"), path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        table = csv.DictReader(file)
        there = list(table.fieldnames or [])
        missing = next((column for column in columns if column not in there), None)
        if missing is not None:
            raise UserError(f"{path} has no column {missing}; {suggestion(missing, there)}")
        rows = list(table)
    for number, row in enumerate(rows, 2):
        if bad := next((column for column in columns if not row[column]), None):
            raise UserError(f"Line {number} of {path} has no {bad}; correct it.")
    return rows


def _numbered(rows: Sequence[Mapping[str, str]], column: str, layout: Layout) -> tuple[list[str], Tensor]:
    """Return the names of the values of a column in order, and the number of each row's value, int64 (N,)."""
    there = {row[column] for row in rows}
    whole = all(is_number(value.removeprefix("-")) for value in there)
    order = sorted(there, key=int) if whole else sorted(there)
    known = layout.names.get(column, {})
    place = {value: k for k, value in enumerate(order)}
    return [known.get(value, value) for value in order], torch.tensor([place[row[column]] for row in rows])
