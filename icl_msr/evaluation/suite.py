"""The evaluation at the end of a run: every encoder x classifier x fitting set x test split, and the gaps between them.

It knows nothing of training: encoders and a data set in, plain records out.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.storage import atomic_write
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.background import background_gaps
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.health import alignment, effective_rank, feature_std, spread
from icl_msr.evaluation.knn import PresetName, knn_scores
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.linear import LinearProbe, ProbeName, fit_linear_probe
from icl_msr.evaluation.metrics import Bootstrap, Interval
from icl_msr.evaluation.scores import confusion, in_top, most_confused, per_class
from icl_msr.evaluation.subsets import Crops, Some

Fraction = Annotated[float, Field(gt=0, lt=1)]

LARGEST_MATRIX = 32
"""Classes up to which the whole confusion is in the records; that of any number follows from predictions.npz."""
LOOKED_AT = 4096
"""Images that the health of a representation is measured on, at most."""

CROPPED = 1024
"""Images that two crops are taken of, at most."""


class Row(TypedDict):
    """What was evaluated, and how."""

    encoder: str
    """`trained`, the one that is evaluated, or `untrained`."""
    classifier: str
    """`linear`, `linear-<preset>`, `knn-<preset>`, `finetune` or `head`; `-1%` at the end: fitted with a part of the
    labels."""
    fitted_on: str
    """`train` or `balanced`; `stimuli` for what is read inside them, `own` for the classifier that the encoder has."""


class Accuracy(Row):
    """Accuracies on one test split, in [0, 1], top-1 with its 95 % interval over n images."""

    split: str
    top1: float
    low: float
    high: float
    n: int
    top5: float | None
    """None of five classes or fewer. A class that no neighbour votes for is no answer of kNN."""


class Gap(Row):
    """A difference between test splits in percentage points, with its 95 % interval; see `background.GAPS`."""

    gap: str
    points: float
    low: float
    high: float


class ByClass(Row):
    """Where one classifier is right on a test split, and what it takes for what."""

    split: str
    accuracies: list[float | None]
    """In [0, 1], in the order of the classes; None of a class without images."""
    confused: list[tuple[str, str, int]]
    """(true class, predicted class, images): the ten largest confusions."""
    confusion: list[list[int]] | None
    """Images of each true class (rows) taken for each class (columns); None of more than `LARGEST_MATRIX` classes."""


class Health(TypedDict):
    """How well one encoder uses its space, on n images of a test split; see `evaluation.health`."""

    encoder: str
    split: str
    n: int
    channels: int
    effective_rank: float | None
    feature_std: float | None
    spread: float | None
    alignment: float | None
    """Of two random crops of an image. None where a measure has no value, as of features that are all zero."""


class Choice(TypedDict):
    """The learning rate of a classifier, and the held-out accuracies (in [0, 1]) that chose it."""

    encoder: str
    classifier: str
    fitted_on: str
    learning_rate: float
    held_out_accuracies: dict[str, float]
    note: str
    """Empty, or a warning that the choice lies at the edge of the grid."""


@dataclass
class Results:
    """What an evaluation found."""

    accuracies: list[Accuracy] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    by_class: list[ByClass] = field(default_factory=list)
    health: list[Health] = field(default_factory=list)
    corruptions: list[Any] = field(default_factory=list)
    """Of `corruptions.CorruptedAccuracy`."""
    shape: list[Any] = field(default_factory=list)
    """Of `shape.ShapeBias`."""
    decodability: list[Any] = field(default_factory=list)
    """Of `shape.Decodability`."""
    similarity: list[Any] = field(default_factory=list)
    """Of `similarity.Alike`."""
    textures: list[Any] = field(default_factory=list)
    """Of `textures.TextureAccuracy`."""
    labelled: list[Any] = field(default_factory=list)
    """Of `labels.Labelled`."""
    lists: dict[str, list[str]] = field(default_factory=dict)
    """Names of images, by the name of the text file that `save` writes."""
    predictions: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Predicted classes (n,) under `encoder/classifier/fitted_on/split`, and true ones under `labels/split`: what
    `numpy.savez` takes, for paired comparisons between runs."""
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """float32 (N, c) on the CPU, by encoder and split (`train`, `balanced` and the test splits)."""

    def records(self) -> dict[str, Any]:
        """The plain-data part, ready for JSON."""
        return {
            "accuracies": self.accuracies,
            "gaps": self.gaps,
            "probes": self.choices,
            "per_class": self.by_class,
            "health": self.health,
            "corruptions": self.corruptions,
            "shape": self.shape,
            "decodability": self.decodability,
            "similarity": self.similarity,
            "textures": self.textures,
            "labelled": self.labelled,
        }

    def save(self, folder: Path) -> None:
        """Writes what is too long for the records: `predictions.npz`, and each list as a file, one name a line."""
        np.savez_compressed(folder / "predictions.npz", **self.predictions)  # type: ignore[arg-type]
        for file, names in self.lists.items():
            atomic_write(folder / file, "\n".join(names) + "\n")

    def add(self, other: "Results") -> None:
        """Puts what another evaluation of the same encoders found behind what is here; a row that is here stays."""
        for part in fields(self):
            here, there = getattr(self, part.name), getattr(other, part.name)
            if isinstance(here, dict):
                here.update({key: value for key, value in there.items() if key not in here})
            else:
                here.extend([row for row in there if row not in here])


class Extractor(Protocol):
    """`features.extract`, or what does the same: (encoder, split) to float32 (N, c) on the CPU."""

    def __call__(
        self,
        encoder: nn.Module,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        batch_size: int,
        label: str = ...,
    ) -> Tensor:
        """See `features.extract`."""
        ...


@dataclass(frozen=True)
class Look:
    """One encoder, and all that a measurement of it needs beside its config."""

    encoder: str
    """`trained` or `untrained`."""
    network: nn.Module
    dataset: Dataset
    device: torch.device
    seed: int
    bootstrap: Bootstrap
    batch_size: int
    extractor: Extractor

    def features(self, split: Split, name: str) -> Tensor:
        """float32 (N, c) on the device; `name` is for the progress bar."""
        found = self.extractor(
            self.network,
            split,
            mean=self.dataset.mean,
            std=self.dataset.std,
            device=self.device,
            batch_size=self.batch_size,
            label=f"{self.encoder} features of {name}",
        )
        return found.to(self.device)


@dataclass(kw_only=True)
class Evaluation:
    """kNN and linear probes on cached features, fitted on the train split and on the balanced one.

    Config keys: `knn` names the kNN presets; `linear` asks for the linear probe, whose keys are `probe` (a preset of
    `linear.PROBES`), `learning_rates`, `probe_epochs`, `probe_batch_size` and `probe_held_out` (a fraction of the
    fitting set); `bootstrap` is the number of resamples; `untrained` asks for the untrained encoder beside the trained
    one; `batch_size` is the number of images in a forward pass.

    Other evaluations add keys of their own and say in `names` and `measure` what is measured.
    """

    knn: list[PresetName]
    linear: bool
    probe: ProbeName
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    probe_epochs: PositiveInt
    probe_batch_size: PositiveInt
    probe_held_out: Fraction
    bootstrap: PositiveInt
    untrained: bool
    batch_size: PositiveInt

    def names(self, dataset: Dataset) -> list[str]:
        """What will be measured: `classifier/fitted_on/split`.

        Raises:
            UserError: the data set lacks something for it.
        """
        if not dataset.classified:
            return []
        require_labels(dataset)
        return ["/".join(parts) for parts in itertools.product(self.classifiers, fitting_sets(dataset), dataset.tests)]

    def require(self, encoder: nn.Module) -> None:
        """Before anything is measured.

        Raises:
            UserError: the encoder lacks something for it.
        """

    @property
    def classifiers(self) -> list[str]:
        """The names of what is fitted."""
        return [*(f"knn-{preset}" for preset in self.knn), *([self.linear_name] if self.linear else [])]

    @property
    def linear_name(self) -> str:
        """The name of the linear probe."""
        return "linear" if self.probe == "ours" else f"linear-{self.probe}"

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
        """Evaluate `encoder`, and `untrained_encoder` if given and asked for; both map images to pooled features.

        Both are moved to `device` and otherwise left as they are. `seed` decides the held-out images, the probe's
        order of images and the bootstrap, all of them the same for both encoders.

        Raises:
            UserError: a feature is not finite.
        """
        results, bootstrap = Results(), Bootstrap(self.bootstrap, seed)
        for name, network in both(encoder, untrained_encoder if self.untrained else None).items():
            look = Look(name, network, dataset, torch.device(device), seed, bootstrap, self.batch_size, extractor)
            self.measure(look, results)
        return results

    def measure(self, look: Look, results: Results) -> None:
        """Adds what is found of one encoder to the results."""
        dataset = look.dataset
        fitting = fitting_sets(dataset)
        features = {name: look.features(split, name) for name, split in {**fitting, **dataset.tests}.items()}
        results.features[look.encoder] = {name: values.cpu() for name, values in features.items()}
        first = next(iter(dataset.tests))
        results.health.append(health(look, first, dataset.tests[first], features[first]))
        if not dataset.classified:
            return
        tests = {name: features[name] for name in dataset.tests}
        for fitted_on, split in fitting.items():
            for row, scores in self.scores(look, fitted_on, features[fitted_on], split.labels, tests, results):
                record_tests(look, row, scores, results)

    def scores(
        self,
        look: Look,
        fitted_on: str,
        bank: Tensor,
        labels: Tensor,
        tests: Mapping[str, Tensor],
        results: Results,
        suffix: str = "",
    ) -> Iterator[tuple[Row, dict[str, Tensor]]]:
        """Class scores (n, K) on the CPU of `tests`, features (n, c) by name, by each classifier fitted to the bank.

        `bank` (M, c) has `labels` (M,). How the probe was chosen goes to the results. `suffix` is what the names of
        classifiers end with.
        """
        queries, classes = torch.cat(list(tests.values())), len(look.dataset.classes)
        scores, probe = self.fit(bank, labels.to(look.device), queries, classes, look.seed)
        if probe is not None:
            results.choices.append(choice(look.encoder, f"{self.linear_name}{suffix}", fitted_on, probe))
        for classifier, values in scores.items():
            parts = torch.split(values.cpu(), [len(features) for features in tests.values()])
            row = Row(encoder=look.encoder, classifier=f"{classifier}{suffix}", fitted_on=fitted_on)
            yield row, dict(zip(tests, parts, strict=True))

    def fit(
        self, bank: Tensor, labels: Tensor, queries: Tensor, classes: int, seed: int
    ) -> tuple[dict[str, Tensor], LinearProbe | None]:
        """Class scores (N, K) of `queries` (N, c) by every classifier fitted to `bank` (M, c), and the probe, if any.

        Images of the bank whose label is negative have none and are left out.
        """
        labelled = labels >= 0  # STL-10 trains on unlabelled images too
        bank, labels = bank[labelled], labels[labelled]
        votes = knn_scores(bank, labels, queries, self.knn, classes)
        scores: dict[str, Tensor] = {f"knn-{preset}": values for preset, values in votes.items()}
        if not self.linear:
            return scores, None
        probe = self.fit_probe(bank, labels, classes, seed)
        return {**scores, self.linear_name: probe(queries)}, probe

    def fit_probe(self, features: Tensor, labels: Tensor, classes: int, seed: int) -> LinearProbe:
        """See `linear.fit_linear_probe`."""
        return fit_linear_probe(
            features,
            labels,
            classes,
            learning_rates=self.learning_rates,
            epochs=self.probe_epochs,
            batch_size=self.probe_batch_size,
            held_out=self.probe_held_out,
            seed=seed,
            preset=self.probe,
        )


def fitting_sets(dataset: Dataset) -> dict[str, Split]:
    """What classifiers are fitted on, by name."""
    return {"train": dataset.train, **({} if dataset.balanced is None else {"balanced": dataset.balanced})}


def named_split(dataset: Dataset, name: str | None) -> str:
    """The name of the test split that `evaluation.split` asks for, by default the first.

    Raises:
        UserError: there is no such split.
    """
    if name is not None and name not in dataset.tests:
        raise UserError(f"evaluation.split={name} is no test split; {suggestion(name, dataset.tests)}")
    return name or next(iter(dataset.tests))


def record_tests(look: Look, row: Row, scores: Mapping[str, Tensor], results: Results) -> None:
    """Puts class scores (n, K) of every test split, and the gaps between them, into the results."""
    dataset = look.dataset
    labels = {name: split.labels.cpu() for name, split in dataset.tests.items()}
    correct = {name: record(look, row, name, scores[name], labels[name], results) for name in labels}
    gaps = background_gaps(correct, labels, dataset.chance, look.bootstrap, dataset.shifted)
    results.gaps += [gap(row, name, interval) for name, interval in gaps.items()]


def record(look: Look, row: Row, split: str, scores: Tensor, labels: Tensor, results: Results) -> Tensor:
    """Puts class `scores` (n, K) of images with `labels` (n,) into the results; bool (n,), where they are right."""
    predicted = scores.argmax(1)
    keep_predictions(row, split, predicted, labels, results)
    results.accuracies.append(accuracy(row, split, scores, labels, look.bootstrap))
    results.by_class.append(by_class(row, split, predicted, labels, look.dataset.classes))
    return predicted == labels


def keep_predictions(row: Row, split: str, predicted: Tensor, labels: Tensor, results: Results) -> None:
    """Predicted and true classes (n,), under the names that `Results.predictions` has them by."""
    results.predictions[f"labels/{split}"] = labels.numpy()
    results.predictions["/".join([row["encoder"], row["classifier"], row["fitted_on"], split])] = predicted.numpy()


def gap(row: Row, name: str, interval: Interval) -> Gap:
    """Of a difference of accuracies in [-1, 1]."""
    points, low, high = (100 * value for value in interval)
    return Gap(**row, gap=name, points=points, low=low, high=high)


def both(encoder: nn.Module, untrained: nn.Module | None) -> dict[str, nn.Module]:
    """The encoders by the names that they have in all records."""
    return {"trained": encoder, **({} if untrained is None else {"untrained": untrained})}


def accuracy(row: Row, split: str, scores: Tensor, labels: Tensor, bootstrap: Bootstrap) -> Accuracy:
    """Of class `scores` (n, K) on one split with `labels` (n,)."""
    top1, low, high = bootstrap.mean(scores.argmax(1) == labels)
    top5 = top_five(row["classifier"], scores, labels)
    return Accuracy(**row, split=split, top1=top1, low=low, high=high, n=len(labels), top5=top5)


def top_five(classifier: str, scores: Tensor, labels: Tensor) -> float | None:
    """Top-5 accuracy of class `scores` (n, K); see `Accuracy`."""
    if scores.shape[1] <= 5:
        return None
    hits = in_top(scores, labels, 5)
    if classifier.startswith("knn"):
        hits &= scores.gather(1, labels[:, None])[:, 0] > 0
    return hits.float().mean().item()


def by_class(row: Row, split: str, predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> ByClass:
    """Of predicted and true classes (n,)."""
    matrix = confusion(predicted, labels, len(classes))
    return ByClass(
        **row,
        split=split,
        accuracies=per_class(matrix),
        confused=[(classes[true], classes[taken], n) for true, taken, n in most_confused(matrix, 10)],
        confusion=matrix.tolist() if len(classes) <= LARGEST_MATRIX else None,
    )


def health(look: Look, name: str, split: Split, features: Tensor) -> Health:
    """Of the `features` (N, c) of the split of that name, up to `LOOKED_AT` of them, spread evenly."""
    index = torch.linspace(0, len(features) - 1, min(LOOKED_AT, len(features))).round().long()
    seen = features[index.to(features.device)]
    crops = [Crops(Some(split, index[:: -(-len(index) // CROPPED)]), view, look.seed, look.device) for view in (0, 1)]
    first, second = (look.features(crop, f"crops of {name}") for crop in crops)
    measures = [measure(seen) for measure in (effective_rank, feature_std, spread)]
    rank, std, apart, near = (
        value if math.isfinite(value) else None for value in (*measures, alignment(first, second))
    )
    return Health(
        encoder=look.encoder,
        split=name,
        n=len(seen),
        channels=seen.shape[1],
        effective_rank=rank,
        feature_std=std,
        spread=apart,
        alignment=near,
    )


def choice(encoder: str, classifier: str, fitted_on: str, probe: LinearProbe) -> Choice:
    """How the learning rate of a probe was chosen."""
    rate = f"{probe.learning_rate:g}"
    note = f"The chosen learning rate {rate} lies at the edge of the grid: widen evaluation.learning_rates."
    return Choice(
        encoder=encoder,
        classifier=classifier,
        fitted_on=fitted_on,
        learning_rate=probe.learning_rate,
        held_out_accuracies={f"{rate:g}": accuracy for rate, accuracy in probe.held_out_accuracies.items()},
        note=note if probe.at_edge else "",
    )
