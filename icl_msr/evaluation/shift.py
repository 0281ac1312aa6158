"""How much of the accuracy on clean images is left on corrupted ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.config import suggestion
from icl_msr.data.dataset import Dataset, Split
from icl_msr.errors import UserError
from icl_msr.evaluation.cache import split_identity
from icl_msr.evaluation.corruptions import Corruption, corrupt
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import PresetName
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.suite import (
    Accuracy,
    Evaluation,
    Extractor,
    Fraction,
    Gap,
    Results,
    Row,
    accuracy,
    both,
    choice,
    health,
    top_five,
)

Severity = Literal[1, 2, 3, 4, 5]
MEAN = "mean"
"""The name of the mean over all corruptions."""


class CorruptedAccuracy(Row):
    """Top-1 accuracy under one corruption, in [0, 1], with its 95 % interval over the n images.

    `severity` None is the mean over severities, and the corruption `mean` that over all corruptions.
    """

    split: str
    corruption: str
    severity: int | None
    top1: float
    low: float
    high: float
    n: int


@dataclass
class Some:
    """Some of the images of a split."""

    split: Split
    index: Tensor
    """(n,) int64."""

    def __post_init__(self) -> None:
        self.labels = self.split.labels.cpu()[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: Tensor) -> Tensor:
        """See `Split.load`."""
        return self.split.load(self.index[index])

    def identity(self) -> str | None:
        """See `cache.Identified`."""
        known = split_identity(self.split)
        return None if known is None else f"{known} {self.index.tolist()}"


@dataclass
class Corrupted:
    """Images under each of several corruptions, one after the other: n for each."""

    clean: Some
    variants: Sequence[tuple[Corruption, int]]
    """(corruption, severity)."""
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.labels = self.clean.labels.repeat(len(self.variants))

    def __len__(self) -> int:
        return len(self.clean) * len(self.variants)

    def load(self, index: Tensor) -> Tensor:
        """See `Split.load`; the images lie on `device`."""
        variant, place = index // len(self.clean), index % len(self.clean)
        images = self.clean.load(place).to(self.device)
        for v in sorted(set(variant.tolist())):
            chosen = (variant == v).nonzero()[:, 0]
            at = chosen.to(self.device)
            images[at] = corrupt(images[at], *self.variants[v], seed=self.seed, index=self.clean.index[place[chosen]])
        return images

    def identity(self) -> str | None:
        """See `cache.Identified`."""
        known = self.clean.identity()
        return None if known is None else f"{known} {self.seed} {list(self.variants)}"


class CorruptionRobustness:
    """Classifiers fitted on clean training images, tested on clean and on corrupted ones.

    Config keys: those of `suite.Evaluation`; `corruptions` and `severities` of `evaluation.corruptions`; `images` of
    the test split at most, spread evenly over it; `split` names it, null is the first. All of them are shown under
    every corruption and severity, so that all means weigh them alike.
    """

    def __init__(
        self,
        *,
        knn: list[PresetName],
        linear: bool,
        learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)],
        probe_epochs: PositiveInt,
        probe_batch_size: PositiveInt,
        probe_held_out: Fraction,
        bootstrap: PositiveInt,
        untrained: bool,
        batch_size: PositiveInt,
        corruptions: Annotated[list[Corruption], Field(min_length=1)],
        severities: Annotated[list[Severity], Field(min_length=1)],
        images: PositiveInt,
        split: str | None,
    ) -> None:
        self.classifiers = Evaluation(
            knn=knn,
            linear=linear,
            learning_rates=learning_rates,
            probe_epochs=probe_epochs,
            probe_batch_size=probe_batch_size,
            probe_held_out=probe_held_out,
            bootstrap=bootstrap,
            untrained=untrained,
            batch_size=batch_size,
        )
        self.bootstrap, self.untrained, self.batch_size = bootstrap, untrained, batch_size
        # In the order of the paper, whatever the order and however often they were typed.
        known = [name for name in get_args(Corruption) if name in corruptions]
        self.variants = [(name, severity) for name in known for severity in sorted(set(severities))]
        self.images, self.split = images, split

    def names(self, dataset: Dataset) -> list[str]:
        """What will be measured: `classifier/fitted_on/split`.

        Raises:
            UserError: the data set has no such split.
        """
        self._split(dataset)
        return [
            f"{classifier}/train/{shown}"
            for classifier in self.classifiers.classifiers
            for shown in ("clean", "corrupted")
        ]

    def __call__(
        self,
        encoder: nn.Module,
        dataset: Dataset,
        *,
        device: torch.device | str,
        seed: int,
        untrained_encoder: nn.Module | None = None,
        extractor: Extractor = extract,
    ) -> Results:
        """See `suite.Evaluation`; `seed` decides the corruptions as well, the same for all encoders."""
        device = torch.device(device)
        results, bootstrap = Results(), Bootstrap(self.bootstrap, seed)
        name = self._split(dataset)
        split = dataset.tests[name]
        index = torch.linspace(0, len(split) - 1, min(self.images, len(split))).round().long()
        clean = Some(split, index)
        corrupted = Corrupted(clean, self.variants, seed, device)
        results.predictions = {"labels/clean": clean.labels.numpy(), "labels/corrupted": corrupted.labels.numpy()}
        for which, network in both(encoder, untrained_encoder if self.untrained else None).items():
            shown: dict[str, Split] = {"train": dataset.train, "clean": clean, "corrupted": corrupted}
            features = {
                part: extractor(
                    network,
                    images,
                    mean=dataset.mean,
                    std=dataset.std,
                    device=device,
                    batch_size=self.batch_size,
                    label=f"{which} features of {part} images",
                )
                for part, images in shown.items()
            }
            results.health.append(health(which, "clean", features["clean"].to(device)))
            bank, labels = features["train"].to(device), dataset.train.labels.to(device)
            queries = torch.cat([features["clean"], features["corrupted"]]).to(device)
            scores, probe = self.classifiers.fit(bank, labels, queries, len(dataset.classes), seed)
            if probe is not None:
                results.choices.append(choice(which, "train", probe))
            for classifier, values in scores.items():
                row = Row(encoder=which, classifier=classifier, fitted_on="train")
                self._measure(row, name, values.cpu(), clean.labels, bootstrap, results)
        return results

    def _split(self, dataset: Dataset) -> str:
        name = self.split or next(iter(dataset.tests))
        if name not in dataset.tests:
            raise UserError(f"evaluation.split={name} is no test split; {suggestion(name, dataset.tests)}")
        return name

    def _measure(
        self, row: Row, split: str, scores: Tensor, labels: Tensor, bootstrap: Bootstrap, results: Results
    ) -> None:
        """`scores` (n + n variants, K), those of the clean images first."""
        n = len(labels)
        repeated = labels.repeat(1 + len(self.variants))
        predicted = scores.argmax(1)
        hits = (predicted == repeated).view(-1, n)
        where = "/".join([row["encoder"], row["classifier"], row["fitted_on"]])
        results.predictions[f"{where}/clean"] = predicted[:n].numpy()
        results.predictions[f"{where}/corrupted"] = predicted[n:].numpy()

        def found(corruption: str, severity: int | None, chosen: Tensor) -> CorruptedAccuracy:
            # Sums are whole numbers, so that the resampled means are exact.
            top1, low, high = (value / len(chosen) for value in bootstrap.mean(chosen.sum(0)))
            return CorruptedAccuracy(
                **row, split=split, corruption=corruption, severity=severity, top1=top1, low=low, high=high, n=n
            )

        rows = [found(*variant, hits[1 + v : 2 + v]) for v, variant in enumerate(self.variants)]
        for name in dict.fromkeys(name for name, _ in self.variants):
            chosen = [v + 1 for v, (other, _) in enumerate(self.variants) if other == name]
            rows.append(found(name, None, hits[chosen]))
        overall = found(MEAN, None, hits[1:])
        results.corruptions += [*rows, overall]

        results.accuracies.append(accuracy(row, "clean", scores[:n], labels, bootstrap))
        top5 = top_five(row["classifier"], scores[n:], repeated[n:])
        corrupted = Accuracy(
            **row, split="corrupted", top1=overall["top1"], low=overall["low"], high=overall["high"], n=n, top5=top5
        )
        results.accuracies.append(corrupted)
        variants = len(self.variants)
        lost = bootstrap.mean(variants * hits[0].long() - hits[1:].sum(0))
        points, low, high = (100 * value / variants for value in lost)
        results.gaps.append(Gap(**row, gap="clean - corrupted", points=points, low=low, high=high))
