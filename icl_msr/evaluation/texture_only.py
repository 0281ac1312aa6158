"""Which classes are told from texture alone? Test images turned into non-semantic versions of themselves.

Ge et al., Robust Contrastive Learning Using Negative Samples with Diminished Semantics, NeurIPS 2021: some classes are
recognised by their texture, and the non-semantic negatives of their images are false ones; coarse classes show whether
what is taken for another class is at least near.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from icl_msr.core.config import build, check_node
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.cache import split_identity
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.metrics import Bootstrap, Interval
from icl_msr.evaluation.suite import Evaluation, Look, Results, Row, gap, health, named_split, record

_VIEW = -200
"""The view number of these images' keys."""


class ByName(TypedDict):
    """Top-1 accuracy in [0, 1], with its 95 % interval over n images, that of guessing, and that of each class."""

    top1: float
    low: float
    high: float
    n: int
    chance: float
    by_class: dict[str, float | None]
    """By name; None of a class without images."""


class TextureAccuracy(Row, ByName):
    """What one classifier is right about on one kind of images."""

    split: str
    images: str
    """`only_<generator>`, or the name of the split itself: as they are."""
    level: str
    """`fine`, or `coarse`: the classes of a superclass count as one."""


@dataclass
class NonSemanticVersions:
    """The images of a split, each turned into one of its non-semantic negatives."""

    split: Split
    generator: Any
    """A generator of negatives, see `datamodule.Negatives`."""
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.labels = self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def load(self, index: Tensor) -> Tensor:
        """See `Split.load`; the images lie on `device`."""
        images = self.split.load(index).to(self.device)
        made: Tensor = self.generator(images.float(), keys(self.seed, 0, index.to(self.device), _VIEW))
        return made[:, 0].round().clamp(0, 255).byte()

    def identity(self) -> str | None:
        """See `cache.Identified`."""
        known = split_identity(self.split)
        return None if known is None else f"{known} {self.seed} {type(self.generator)} {vars(self.generator)}"


@dataclass(kw_only=True)
class TextureImages(Evaluation):
    """Classifiers fitted on training images as they are, tested on non-semantic versions of the test images.

    Config keys: those of `suite.Evaluation`; `generators` by name, each as in the group `negatives`; `split` of the
    test, null is the first; `superclasses`, a file (`read_superclasses`), null is what the data set says of itself, if
    anything. The run's seed decides the versions, the same for all encoders.
    """

    generators: dict[str, dict[str, Any]]
    split: str | None
    superclasses: str | None
    built: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.built = {}
        for name, node in self.generators.items():
            key = f"evaluation.generators.{name}"
            check_node(key, node)
            self.built[f"only_{name}"] = generator = build(node)
            if not callable(generator):
                raise UserError(f"{key} is no generator that makes images; leave it out with ~{key}.")

    def names(self, dataset: Dataset) -> list[str]:
        """See `suite.Evaluation`; superclasses may be missing."""
        require_labels(dataset)
        self._superclasses(dataset)
        shown = (named_split(dataset, self.split), *self.built)
        return [f"{classifier}/train/{images}" for classifier in self.classifiers for images in shown]

    def measure(self, look: Look, results: Results) -> None:
        """See `suite.Evaluation`."""
        dataset, name = look.dataset, named_split(look.dataset, self.split)
        split, superclasses = dataset.tests[name], self._superclasses(dataset)
        shown: dict[str, Split] = {name: split}
        for images, generator in self.built.items():
            shown[images] = NonSemanticVersions(split, generator, look.seed, look.device)
        bank = look.features(dataset.train, "train")
        tests = {images: look.features(part, images) for images, part in shown.items()}
        results.health.append(health(look, name, split, tests[name]))
        labels = split.labels.cpu()
        for row, scores in self.scores(look, "train", bank, dataset.train.labels, tests, results):
            for images, values in scores.items():
                correct = record(look, row, images, values, labels, results)
                if images != name:
                    above = Interval(*(value - dataset.chance for value in look.bootstrap.mean(correct)))
                    results.gaps.append(gap(row, f"{images} - chance", above))
                for level, classes in (("fine", dataset.classes), ("coarse", superclasses)):
                    if classes is not None:
                        found = by_name(values.argmax(1), labels, classes, look.bootstrap)
                        results.textures.append(TextureAccuracy(**row, split=name, images=images, level=level, **found))

    def _superclasses(self, dataset: Dataset) -> Sequence[str] | None:
        """Of each class."""
        if self.superclasses is None:
            return dataset.superclasses
        return read_superclasses(Path(self.superclasses).expanduser(), dataset.classes)


def by_name(predicted: Tensor, labels: Tensor, names: Sequence[str], bootstrap: Bootstrap) -> ByName:
    """Of predicted and true classes (n,) by number; `names` (K,) of the classes, those of one name count as one."""
    kinds = list(dict.fromkeys(names))
    kind = torch.tensor([kinds.index(name) for name in names])
    true = kind[labels]
    correct = kind[predicted] == true
    shown, right = (torch.bincount(those, minlength=len(kinds)).tolist() for those in (true, true[correct]))
    top1, low, high = bootstrap.mean(correct)
    return ByName(
        top1=top1,
        low=low,
        high=high,
        n=len(labels),
        chance=float(torch.bincount(kind)[true].double().mean() / len(names)),
        by_class={name: r / n if n else None for name, r, n in zip(kinds, right, shown, strict=True)},
    )


def read_superclasses(file: Path, classes: Sequence[str]) -> list[str]:
    """The superclass of each class, from a CSV file with the columns `class` and `superclass`.

    Raises:
        UserError: there is no such file, it has other columns, or a class is not in it.
    """
    try:
        with file.open(newline="") as lines:
            found: Mapping[str, str] = {line["class"]: line["superclass"] for line in csv.DictReader(lines)}
    except (OSError, KeyError, UnicodeDecodeError):
        raise UserError(
            f"{file} is no file of superclasses; evaluation.superclasses is a .csv file with the columns class and "
            "superclass, or null."
        ) from None
    missing = [name for name in classes if not found.get(name)]
    if missing:
        raise UserError(f"{file} has no superclass for {len(missing)} classes, the first is {missing[0]}; add a line.")
    return [found[name] for name in classes]
