"""Data sets of the `datasets` library: from the hub, from Parquet files, or from a saved folder."""

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded, read_regular
from icl_msr.data.dataset import Dataset, numbered_classes
from icl_msr.data.files import FileSplit, of_files
from icl_msr.data.sources import LARGEST


def huggingface(
    *,
    name: str,
    config: str | None,
    train: str,
    test: str | None,
    image: str,
    label: str | None,
    split: Annotated[float, Field(gt=0, lt=1)],
    image_size: PositiveInt,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
) -> Dataset:
    """Build a data set from the columns of a table that `datasets` reads. It needs the extra `hf`.

    Images stay encoded in the table and are decoded by this package, so they have the same bytes as from files.

    Args:
        name: the name of a set on the hub, a folder of `save_to_disk`, a folder of Parquet files, or one such file.
        config: the configuration of a set on the hub that has several.
        train: the split to train on.
        test: the split to test on. Null holds out a part of `train`.
        image: the column of images, encoded or as paths.
        label: the column of labels. Null is a set without labels.
        split: the fraction that is held out if `test` is null. It is always the same images.
        image_size: length of the short side, in pixels. The centre square is cut.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.

        Raises:
            UserError: the library, the set, a split or a column is missing, or a column has no images or labels.
    """
    tables = _load(name, config)
    chosen = {}
    for key, part in {"train": train, **({} if test is None else {"test": test})}.items():
        if part not in tables:
            raise UserError(f"dataset.{key}={part} is not a split of {name}; {suggestion(part, tables)}")
        chosen[key] = tables[part]
    columns = {"image": image, **({} if label is None else {"label": label})}
    for key, column in columns.items():
        if column not in chosen["train"].column_names:
            there = chosen["train"].column_names
            raise UserError(f"dataset.{key}={column} is not a column of {name}; {suggestion(column, there)}")
    classes = [] if label is None else _classes(chosen["train"], label)
    splits = {key: _split(name, key, table, image, label, classes, image_size) for key, table in chosen.items()}
    if test is None:
        splits["train"], splits["test"] = splits["train"].divided(split)
    return of_files(
        Path(name).name,
        classes,
        splits["train"],
        {"test": splits["test"]},
        "full",
        resident_size=resident_size,
        memory_budget_gb=memory_budget_gb,
    )


@dataclass
class _Column:
    """The encoded images in the rows of a column."""

    name: str
    table: Any
    image: str

    def __getitem__(self, index: int, /) -> bytes:
        cell = self.table[index][self.image]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise UserError(f"Row {index} of {self.name} has no image; take it out.")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        path, homes = os.path.realpath(cell["path"]), [self.name, import_module("datasets").config.HF_CACHE_HOME]
        if not any(path.startswith(os.path.join(os.path.realpath(home), "")) for home in homes):
            raise UserError(f"{self.name} names the file {cell['path']}, which lies elsewhere; put the images into it.")
        return read_regular(Path(path), LARGEST)

    def identity(self) -> str:
        return f"{self.name} {self.table._fingerprint}"

    def prepare(self, index: Tensor) -> None:
        """Do nothing, since the table is on this machine."""


def _load(name: str, config: str | None) -> Any:
    try:
        library = import_module("datasets")
    except ImportError:
        raise UserError("dataset=huggingface needs the package datasets; type pip install 'icl-msr[hf]'.") from None
    path = expanded(name)
    try:
        if (path / "dataset_dict.json").is_file():
            return library.load_from_disk(str(path))
        if (path / "dataset_info.json").is_file() and not list(path.glob("*.parquet")):
            return {"train": library.load_from_disk(str(path))}
        if path.is_file():
            return library.load_dataset("parquet", data_files={"train": str(path)})
        return library.load_dataset(str(path) if path.is_dir() else name, config)
    except Exception as error:  # it may raise anything, from network errors to a damaged file
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{name} cannot be read by datasets ({reason}); set dataset.name to a set on the hub, a folder of "
            "save_to_disk, or Parquet files."
        ) from None


def _classes(table: Any, label: str) -> list[str]:
    feature = table.features[label]
    if getattr(feature, "names", None):
        return list(feature.names)
    values = [value for value in table.unique(label) if value is not None]
    if all(isinstance(value, int) for value in values):
        return numbered_classes(torch.tensor(values, dtype=torch.int64), len(table), f"The column {label}")
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    raise UserError(
        f"dataset.label={label} holds neither whole numbers nor names; set it to another column, or to null."
    )


def _split(
    name: str, part: str, table: Any, image: str, label: str | None, classes: list[str], image_size: int
) -> FileSplit:
    labels = torch.full((len(table),), -1)
    if label is not None:
        number = {value: k for k, value in enumerate(classes)}
        cells = table[label]
        unknown = next((cell for cell in cells if isinstance(cell, str) and cell not in number), None)
        if unknown is not None:
            raise UserError(f"{name} has the label {unknown} in {part}, which no training image has.")
        labels = torch.tensor(
            [number[cell] if isinstance(cell, str) else -1 if cell is None else cell for cell in cells]
        )
    encoded = table.select_columns([image]).cast_column(image, import_module("datasets").Image(decode=False))
    files = [f"{name}/{part}/{i}" for i in range(len(table))]
    return FileSplit(files, labels, image_size, encoded=_Column(name, encoded, image))
