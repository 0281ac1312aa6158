"""Classification of non-semantic versions of the test images, which shows the classes recognised from texture alone.

Ge et al., Robust Contrastive Learning Using Negative Samples with Diminished Semantics, NeurIPS 2021: some classes are
recognised by their texture, and the non-semantic negatives of their images are false negatives. Coarse classes show
whether confused classes are at least related.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.core.records import CHANCE, GAP, ByClass, Chart, Layout, Measurement
from icl_msr.core.storage import expanded
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.metrics import Bootstrap, Interval
from icl_msr.evaluation.subsets import Changed
from icl_msr.evaluation.suite import HEALTH, Evaluation, Fit, Results, Task, gap, health, named_split, record

_VIEW = -200
"""View number of the random keys of these images."""


TEXTURE = Layout(
    kind="texture",
    title="Accuracy on images without their content, %",
    rows=("images", "classifier", "encoder"),
    columns=("level", "metric"),
    labels={"accuracy": "classes"},
    about="Coarse classes are superclasses: the classes of one superclass count as one.",
    notes="most accurate",
    chart=Chart(axis="images", series=("classifier", "encoder"), where={"metric": "accuracy", "level": "fine"}),
)


def non_semantic(split: Split, generator: Any, seed: int, device: torch.device) -> Changed:
    """Return a split in which each image is replaced by one of its non-semantic negatives.

    `generator` makes negatives, see `datamodule.Negatives`.
    """

    def replace(images: Tensor, index: Tensor) -> Tensor:
        made: Tensor = generator(images.float(), keys(seed, 0, index, _VIEW))
        return made[:, 0]

    return Changed(split, replace, f"{seed} {type(generator)} {vars(generator)}", device)


@dataclass(kw_only=True)
class TextureImages(Evaluation):
    """Classifiers fitted on ordinary training images and tested on non-semantic versions of the test images.

    Config keys: those of `suite.Evaluation`. `generators` are nodes by name, as in the group `negatives`. `split` names
    the test split; null is the first. `superclasses` is a file (`read_superclasses`); null means those of the data set,
    if it has any. The run's seed decides the versions. They are the same for all encoders.
    """

    generators: dict[str, Any]
    split: str | None
    superclasses: str | None
    built: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.built = {}
        for name, generator in self.generators.items():
            self.built[f"only_{name}"] = generator
            if not callable(generator):
                key = f"evaluation.generators.{name}"
                raise UserError(f"{key} is not a generator that makes images; leave it out with ~{key}.")

    @override
    def names(self, dataset: Dataset) -> list[str]:
        require_labels(dataset)
        self._superclasses(dataset)
        shown = (named_split(dataset, self.split), *self.built)
        return [f"{classifier}/train/{images}" for classifier in self.classifiers for images in shown]

    @override
    def measure(self, task: Task, results: Results) -> None:
        dataset, name = task.dataset, named_split(task.dataset, self.split)
        split, superclasses = dataset.tests[name], self._superclasses(dataset)
        shown: dict[str, Split] = {name: split}
        for images, generator in self.built.items():
            shown[images] = non_semantic(split, generator, task.seed, task.device)
        bank = task.features(dataset.train, "train")
        tests = {images: task.features(part, images) for images, part in shown.items()}
        results.records.add(HEALTH, *health(task, name, split, tests[name]))
        labels = split.labels.cpu()
        for fit, scores in self.scores(task, "train", bank, dataset.train.labels, tests, results):
            for images, values in scores.items():
                correct = record(task, fit, images, values, labels, results, good=images == name)
                if images != name:
                    above = Interval(*(value - dataset.chance for value in task.bootstrap.mean(correct)))
                    results.records.add(GAP, gap(fit, images, CHANCE, above))
                for level, classes in (("fine", dataset.classes), ("coarse", superclasses)):
                    if classes is not None:
                        told = told_apart(values.argmax(1), labels, classes, task.bootstrap)
                        _record(fit, name, images, level, told, len(labels), results)

    def _superclasses(self, dataset: Dataset) -> Sequence[str] | None:
        """Return the superclass of each class, or None if there are none."""
        if self.superclasses is None:
            return dataset.superclasses
        return read_superclasses(expanded(self.superclasses), dataset.classes)


class Told(NamedTuple):
    """Accuracy of predictions, compared by name."""

    accuracy: Interval
    chance: float
    """The accuracy of guessing."""
    by_name: dict[str, float | None]
    """Accuracy on each name; None for a name without images."""


def told_apart(predicted: Tensor, labels: Tensor, names: Sequence[str], bootstrap: Bootstrap) -> Told:
    """Compare predicted and true classes (n,), given by number. Classes with the same name in `names` (K,) are one."""
    kinds = list(dict.fromkeys(names))
    kind = torch.tensor([kinds.index(name) for name in names])
    true = kind[labels]
    correct = kind[predicted] == true
    shown, right = (torch.bincount(those, minlength=len(kinds)).tolist() for those in (true, true[correct]))
    chance = float(torch.bincount(kind)[true].double().mean() / len(names))
    by_name = {name: r / n if n else None for name, r, n in zip(kinds, right, shown, strict=True)}
    return Told(bootstrap.mean(correct), chance, by_name)


def _record(fit: Fit, split: str, images: str, level: str, told: Told, n: int, results: Results) -> None:
    """Record the accuracy of one classifier on one kind of images."""
    best = sorted(((name, value) for name, value in told.by_name.items() if value), key=lambda pair: -pair[1])[:3]
    note = ", ".join(f"{name} {100 * value:.0f}" for name, value in best) if level == "fine" else ""
    factors = {"images": images, "level": level}
    record = partial(Measurement, kind=TEXTURE.kind, split=split, n=n, factors=factors, **fit._asdict())
    chance = record(metric="chance", value=told.chance)
    results.records.add(TEXTURE, record(**told.accuracy._asdict(), note=note), chance)
    if level == "coarse":  # fine classes have their record already
        by_class = ByClass(
            **fit._asdict(), split=images, classes=list(told.by_name), accuracies=list(told.by_name.values())
        )
        results.records.by_class.append(by_class)


def read_superclasses(file: Path, classes: Sequence[str]) -> list[str]:
    """Read the superclass of each class from a CSV file with the columns `class` and `superclass`.

    Raises:
        UserError: there is no such file, it has other columns, or a class is not in it.
    """
    try:
        with file.open(newline="") as lines:
            found: Mapping[str, str] = {line["class"]: line["superclass"] for line in csv.DictReader(lines)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{file} is not a file of superclasses; evaluation.superclasses is a .csv file with the columns class and "
            "superclass, or null."
        ) from None
    missing = [name for name in classes if not found.get(name)]
    if missing:
        raise UserError(f"{file} has no superclass for {len(missing)} classes, the first is {missing[0]}; add a line.")
    return [found[name] for name in classes]
