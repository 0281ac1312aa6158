"""Robustness: accuracy on clean images, on corrupted ones, and on other images of the same classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.records import ACCURACY, GAP, Chart, Layout, Measurement
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.corruptions import Corruption, corrupt
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.metrics import Interval
from icl_msr.evaluation.subsets import Some
from icl_msr.evaluation.suite import (
    HEALTH,
    TOP5,
    Evaluation,
    Fit,
    Results,
    Task,
    accuracy,
    gap,
    health,
    keep_predictions,
    named_split,
    record_accuracy,
    top_five,
)

Severity = Literal[1, 2, 3, 4, 5]
OWN = ("clean", "corrupted")
"""Names of the images that are always tested. Shifted splits come in addition."""
MEAN = "mean"
"""Name of the mean over all corruptions, and of the mean over severities."""
CORRUPTION = Layout(
    kind="corruption",
    title="Accuracy under corruptions, %",
    rows=("corruption", "classifier", "encoder"),
    columns=("severity",),
    chart=Chart(
        axis="corruption",
        series=("classifier", "encoder"),
        where={"severity": MEAN},
        note="Means over severities. Bars are 95 % intervals over images.",
    ),
)


@dataclass
class Corrupted:
    """The same n images under several corruptions, one corruption after the other."""

    clean: Some
    variants: Sequence[tuple[Corruption, int]]
    """Pairs (corruption, severity)."""
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.labels = self.clean.labels.repeat(len(self.variants))

    def __len__(self) -> int:
        return len(self.clean) * len(self.variants)

    def load(self, index: Tensor) -> Tensor:
        """Load corrupted uint8 images (n, 3, S, S) at positions `index` (n,), on `device`."""
        variant, place = index // len(self.clean), index % len(self.clean)
        images = self.clean.load(place).to(self.device)
        for v in sorted(set(variant.tolist())):
            chosen = (variant == v).nonzero()[:, 0]
            at = chosen.to(self.device)
            images[at] = corrupt(images[at], *self.variants[v], seed=self.seed, index=self.clean.index[place[chosen]])
        return images

    def identity(self) -> str | None:
        """Return a text that is equal only for equal images; see `cache.Identified`."""
        known = self.clean.identity()
        return None if known is None else f"{known} {self.seed} {list(self.variants)}"


@dataclass(kw_only=True)
class CorruptionRobustness(Evaluation):
    """Classifiers fitted on clean training images, tested on clean, corrupted and shifted images.

    Config keys: those of `suite.Evaluation`. `corruptions` and `severities` are those of `evaluation.corruptions`.
    `images` is the largest number of test images, spread evenly over the split. `split` names the test split; null is
    the first. Every image is shown under every corruption and severity, so that all means weight images equally. The
    run's seed also decides the corruptions, which are the same for all encoders. `shifted` asks for all images of the
    data set's shifted splits as well. With them, the accuracies are the columns of Ge et al. (Robust contrastive
    learning using negative samples with diminished semantics, 2021) for ImageNet-100, -C, -Sketch, Stylized and -R.
    """

    corruptions: Annotated[list[Corruption], Field(min_length=1)]
    severities: Annotated[list[Severity], Field(min_length=1)]
    images: PositiveInt
    split: str | None
    shifted: bool

    @property
    def variants(self) -> list[tuple[Corruption, int]]:
        """Pairs (corruption, severity) in the order of the paper, each once."""
        known: list[Corruption] = [name for name in get_args(Corruption) if name in self.corruptions]
        return [(name, severity) for name in known for severity in sorted(set(self.severities))]

    @override
    def names(self, dataset: Dataset) -> list[str]:
        require_labels(dataset)
        named_split(dataset, self.split)
        shown = (*OWN, *self._others(dataset))
        if taken := [name for name in OWN if shown.count(name) > 1]:
            raise UserError(
                f"dataset.shifted.{taken[0]} has a name that the evaluation uses itself; give the folder another one."
            )
        return [f"{classifier}/train/{split}" for classifier in self.classifiers for split in shown]

    def _others(self, dataset: Dataset) -> dict[str, Split]:
        return {name: dataset.tests[name] for name in dataset.shifted if self.shifted}

    @override
    def measure(self, task: Task, results: Results) -> None:
        name = named_split(task.dataset, self.split)
        split, train = task.dataset.tests[name], task.dataset.train
        clean = Some(split, torch.linspace(0, len(split) - 1, min(self.images, len(split))).round().long())
        corrupted = Corrupted(clean, self.variants, task.seed, task.device)
        shown: dict[str, Split] = {"clean": clean, "corrupted": corrupted, **self._others(task.dataset)}
        bank = task.features(train, "train images")
        tests = {part: task.features(images, f"{part} images") for part, images in shown.items()}
        results.records.add(HEALTH, *health(task, "clean", clean, tests["clean"]))
        for fit, scores in self.scores(task, "train", bank, train.labels, tests, results):
            labels = {part: images.labels.cpu() for part, images in shown.items()}
            self._measure(task, fit, name, scores, labels, results)

    def _measure(
        self,
        task: Task,
        fit: Fit,
        split: str,
        scores: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        results: Results,
    ) -> None:
        """Record accuracies and gaps, given `scores` of `clean` (n, K), `corrupted` (variants n, K) and others."""
        bootstrap, n, variants = task.bootstrap, len(labels["clean"]), len(self.variants)
        predicted = {part: values.argmax(1) for part, values in scores.items()}
        for part, classes in predicted.items():
            keep_predictions(fit, part, classes, labels[part], results)
        clean, hits = ((predicted[part] == labels[part]).view(-1, n) for part in ("clean", "corrupted"))

        def found(corruption: str, severity: int | str, chosen: Tensor) -> Measurement:
            # Sums over corruptions are whole numbers, so that the resampled means are exact.
            value, low, high = (part / len(chosen) for part in bootstrap.mean(chosen.sum(0)))
            factors = {"corruption": corruption, "severity": severity}
            record = partial(Measurement, kind=CORRUPTION.kind, split=split, n=n, factors=factors, **fit._asdict())
            return record(value=value, low=low, high=high)

        rows = [found(*variant, hits[v : v + 1]) for v, variant in enumerate(self.variants)]
        for name in dict.fromkeys(name for name, _ in self.variants):
            rows.append(found(name, MEAN, hits[[v for v, (other, _) in enumerate(self.variants) if other == name]]))
        overall = Interval(*(value / variants for value in bootstrap.mean(hits.sum(0))))
        results.records.add(CORRUPTION, *rows, found(MEAN, MEAN, hits))

        record_accuracy(task, fit, "clean", scores["clean"], labels["clean"], results)
        results.records.add(ACCURACY, accuracy(fit, "corrupted", overall, n))
        results.records.add(TOP5, *top_five(fit, "corrupted", scores["corrupted"], labels["corrupted"]))
        lost = bootstrap.mean(variants * clean[0].long() - hits.sum(0))
        results.records.add(GAP, gap(fit, "clean", "corrupted", Interval(*(value / variants for value in lost))))

        for part in (part for part in scores if part not in OWN):
            record_accuracy(task, fit, part, scores[part], labels[part], results)
            paired = torch.equal(labels[part], labels["clean"])  # the same objects, see `Dataset`
            apart = bootstrap.difference(clean[0], predicted[part] == labels[part], paired=paired)
            results.records.add(GAP, gap(fit, "clean", part, apart))
