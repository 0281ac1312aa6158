"""Parts of the labels of a training split: a class-balanced part, or the images in a published list."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import permutation
from icl_msr.core.records import Layout, Measurement
from icl_msr.core.storage import expanded
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.files import FileSplit

_PART = -3
"""The `epoch` of the hash that picks images; training epochs count from 0."""
_SEVERAL = -1
"""A value in place of a position, for a name that several images have."""


LABELS = Layout(
    kind="labels",
    title="Labels used",
    rows=("part", "chosen_by"),
    labels={"chosen_by": "chosen by", "fewest": "fewest of a class", "most": "most of a class"},
    notes="note",
)
"""Layout of the records on the labels used, if only some of them were used."""


@dataclass(frozen=True)
class Part:
    """A part of the training images."""

    index: Tensor
    """(n,) int64 positions in the training split, ascending; all of them have a label."""
    fraction: float
    chosen_by: str
    note: str

    @property
    def file(self) -> str:
        """Name of the file that lists these images; empty for all images."""
        return "" if self.fraction == 1 else f"labelled-{percent(self.fraction)}.txt"

    def records(self, labels: Tensor) -> list[Measurement]:
        """Return counts of images and classes from `labels` (N,) of the training split; none if all images are used."""
        if self.fraction == 1:
            return []
        counts = labels[self.index].bincount()
        counts = counts[counts > 0]
        found = {"images": len(self.index), "classes": len(counts)}
        found |= {"fewest": int(counts.min()), "most": int(counts.max())}
        factors = {"part": percent(self.fraction), "chosen_by": self.chosen_by, "file": self.file}
        return [
            Measurement(
                kind=LABELS.kind,
                metric=metric,
                value=value,
                unit="count",
                factors=factors,
                note=self.note if metric == "images" else "",
            )
            for metric, value in found.items()
        ]


def percent(fraction: float) -> str:
    """Return a fraction in per cent: 0.01 becomes `1%`."""
    return f"{100 * fraction:g}%"


def require_labels(dataset: Dataset) -> None:
    """Check that a data set has classes, and at least two training images with a label.

    Raises:
        UserError: it has not.
    """
    labelled = int((dataset.train.labels >= 0).sum())
    if not dataset.classified:
        raise UserError(
            f"{dataset.name} has {'one class' if dataset.classes else 'no labels'}, and this evaluation fits "
            "classifiers to labels; choose another dataset, dataset.labelled of dataset=images, or evaluation=default."
        )
    if labelled < 2:
        has = f"has {labelled or 'no'} training image{'' if labelled == 1 else 's'} with a label"
        raise UserError(
            f"{dataset.name} {has}, and this evaluation fits classifiers to them; choose another dataset, or "
            "evaluation=none."
        )


def balanced_part(dataset: Dataset, fraction: float, seed: int) -> Part:
    """Return a class-balanced `fraction` of the labelled training images, with at least one image of every class.

    A smaller fraction with the same seed is a part of a larger one. Classes without labelled images are left out.
    """
    labels = dataset.train.labels.cpu()
    labelled = int((labels >= 0).sum())
    if fraction == 1:
        return Part((labels >= 0).nonzero()[:, 0], fraction, "all", "")
    counts = labels[labels >= 0].bincount(minlength=len(dataset.classes))
    known = int((counts > 0).sum())
    exact = fraction * labelled / known
    each = max(1, round(exact))
    index = some_of_each(labels, each, permutation(seed, _PART, len(labels)))
    notes = []
    if exact < 1:
        notes.append(
            f"{percent(fraction)} of {labelled} labels is less than one for each of {known} classes, so one image of "
            f"each is used, {percent(round(len(index) / labelled, 4))}"
        )
    if known < len(dataset.classes):
        notes.append(f"{len(dataset.classes) - known} of {len(dataset.classes)} classes have no label")
    if int(counts[counts > 0].min()) < each:
        notes.append(f"classes with fewer than {each} images give all they have")
    return Part(index, fraction, f"seed {seed}", "; ".join(notes))


def some_of_each(kinds: Tensor, each: int, order: Tensor) -> Tensor:
    """Return the positions (int64, ascending) of up to `each` images of every kind, the first ones of an order (N,).

    `kinds` is int64 (N,); images of a negative kind are left out.
    """
    order = order[kinds[order] >= 0]
    order = order[kinds[order].argsort(stable=True)]
    counts = kinds[order].bincount()
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[kinds[order]]
    return order[place < each].sort().values


def listed_part(dataset: Dataset, fraction: float, file: Path) -> Part:
    """Return the training images that a file lists, one per line.

    A line is the end of an image's path, or its position if images have no files of their own. Other names are ignored,
    so that the list for ImageNet can be used for ImageNet-100.

    Raises:
        UserError: the file cannot be read, a name fits several images, or the file lists fewer than two labelled
            training images.
    """
    try:
        lines = [line.strip() for line in expanded(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"{file} cannot be read ({reason}); evaluation.files names lists of images.") from None
    labels, names = dataset.train.labels.cpu(), _paths(dataset.train)
    tables: dict[int, dict[str, int]] = {}
    found: set[int] = set()
    for line in lines:
        parts = line.count("/") + 1
        if parts not in tables:
            tables[parts] = _by_end(names, parts)
        position = tables[parts].get(line)
        if position == _SEVERAL:
            raise UserError(
                f"{file} names {line}, and {dataset.name} has several such training images; "
                "write the names with their folders, as in class/name."
            )
        if position is not None and labels[position] >= 0:
            found.add(position)
    if len(found) < 2:
        raise UserError(
            f"{file} names {len(found) or 'no'} labelled training image{'' if len(found) == 1 else 's'} of "
            f"{dataset.name}, which has names like {'/'.join(names[0][-2:])}; give another list in evaluation.files."
        )
    index = torch.tensor(sorted(found))
    notes = []
    if unknown := len(set(lines)) - len(found):
        notes.append(f"{unknown} of {len(set(lines))} names are not labelled training images here")
    share = len(found) / int((labels >= 0).sum())
    if not 0.8 < share / fraction < 1.25:
        notes.append(f"the list covers {percent(round(share, 4))} of the labels")
    if lacking := len(dataset.classes) - len(set(labels[index].tolist())):
        notes.append(f"{lacking} of {len(dataset.classes)} classes have no image in the list")
    return Part(index, fraction, str(file), "; ".join(notes))


def names(split: Split, index: Tensor) -> list[str]:
    """Return names of the images at `index` (n,), as short as possible but unique in the split; see `listed_part`."""
    paths = _paths(split)
    longest = max(map(len, paths))
    parts = next((n for n in range(1, longest) if len(_by_end(paths, n)) == len(paths)), longest)
    return ["/".join(paths[i][-parts:]) for i in index.tolist()]


def _by_end(paths: Sequence[Sequence[str]], parts: int) -> dict[str, int]:
    """Return positions by the last `parts` of their paths; `_SEVERAL` if these are not unique."""
    table: dict[str, int] = {}
    for position, path in enumerate(paths):
        end = "/".join(path[-parts:])
        table[end] = _SEVERAL if end in table else position
    return table


def _paths(split: Split) -> list[list[str]]:
    files: Sequence[str] | None = split.files if isinstance(split, ArraySplit | FileSplit) else None
    places = map(str, range(len(split)) if files is None else files)
    return [place.strip("/").split("/") for place in places]
