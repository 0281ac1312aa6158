"""Evaluation of encoders: every encoder x classifier x fitting set x test split, and the gaps between splits.

It takes encoders and a data set and returns records. It does not depend on training.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.core.config import suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.figures import Overlays
from icl_msr.core.folder import RunFolder
from icl_msr.core.records import (
    ACCURACY,
    GAP,
    TRAINED,
    UNTRAINED,
    ByClass,
    Classifier,
    Layout,
    Measurement,
    Records,
)
from icl_msr.core.storage import atomic_write, replacing
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.background import WITHOUT_OBJECT, background_gaps
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.health import alignment, effective_rank, feature_std, spread
from icl_msr.evaluation.knn import PresetName, knn_scores
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.linear import LinearProbe, ProbeName, fit_linear_probe
from icl_msr.evaluation.metrics import Bootstrap, Interval
from icl_msr.evaluation.scores import confusion, in_top, most_confused, per_class
from icl_msr.evaluation.subsets import Some, crops

Fraction = Annotated[float, Field(gt=0, lt=1)]

TOP5 = replace(ACCURACY, kind="top5", title="Top-5 accuracy, %", heat=False, folded=True, chart=None)
HEALTH = Layout(
    kind="health",
    title="Representation",
    rows=("encoder", "split"),
    labels={"split": "images of", "effective_rank": "effective rank", "feature_std": "std", "spread": "uniformity"},
    details={"effective_rank": "of the channels", "feature_std": "1: spread evenly", "alignment": "of two crops"},
    count="n",
)
"""Layout of the measures in `evaluation.health`."""
CHOICE = Layout(
    kind="choice",
    title="The learning rates that were chosen on a held-out part of the fitting set",
    rows=("encoder", "classifier", "fitted_on"),
    columns=("metric", "learning_rate"),
    labels={"fitted_on": "fitted on", "held_out": "%, at"},
    notes="note",
    folded=True,
)

LARGEST_MATRIX = 32
"""Largest number of classes for which the records hold the confusion matrix. predictions.npz has all predictions."""
LOOKED_AT = 4096
"""Largest number of images for the measures of health."""

CROPPED = 1024
"""Largest number of images that are cropped twice, for the alignment."""


class Fit(NamedTuple):
    """A classifier fitted to features: the fields that its records have in common."""

    encoder: str
    """`trained` or `untrained`."""
    classifier: Classifier
    fitted_on: str


@dataclass
class Results:
    """The results of an evaluation: records, and data that is too long for them."""

    records: Records = field(default_factory=Records)
    lists: dict[str, list[str]] = field(default_factory=dict)
    """Names of images, by the name of the text file for `save`."""
    predictions: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Predicted classes (n,) under `encoder/classifier/fitted_on/split`, and true ones under `labels/split`. `save`
    writes them for paired comparisons between runs."""
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Features float32 (N, c) on the CPU, by encoder and split (`train`, `balanced` and the test splits)."""
    overlays: Overlays | None = None
    """Maps over some test images. `save` writes them, so that a summary can show those of several encoders."""

    def save(self, folder: Path) -> None:
        """Write `predictions.npz`, `overlays.npz`, and each list as a text file with one name per line."""
        advice = RunFolder(folder).advice
        with replacing(folder / "predictions.npz", advice) as whole:
            np.savez_compressed(whole, **self.predictions)  # type: ignore[arg-type]
        if self.overlays is not None:
            self.overlays.save(folder, advice)
        for file, names in self.lists.items():
            atomic_write(folder / file, "\n".join(names) + "\n", advice)

    def join(self, other: "Results") -> None:
        """Add the results of another evaluation of the same encoders. Existing results are kept."""
        self.records.join(other.records)
        self.lists = self.lists | other.lists | self.lists
        self.predictions = self.predictions | other.predictions | self.predictions
        self.features = self.features | other.features | self.features
        self.overlays = self.overlays or other.overlays


class Extractor(Protocol):
    """A function like `features.extract`: (encoder, split) to float32 (N, c) on the CPU."""

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
        """Return the features; the arguments are those of `features.extract`."""
        ...


@dataclass(frozen=True)
class Task:
    """One encoder on one data set, with everything that a measurement needs beside the config of the evaluation."""

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
        """Return the features of a split, float32 (N, c) on the device; `name` is for the progress bar."""
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


@runtime_checkable
class Measures(Protocol):
    """What an evaluation has in common: the names of what it measures, and a call that measures it."""

    def names(self, dataset: Dataset) -> list[str]:
        """Return the names of the records that a sweeper may maximise."""
        ...

    def __call__(self, encoder: nn.Module, dataset: Dataset, **keys: Any) -> Results:
        """Measure an encoder on a data set."""
        ...


@dataclass(kw_only=True)
class Evaluation:
    """kNN and linear probes on cached features, fitted on the train split and on the balanced one.

    Config keys: `knn` names the kNN presets. `linear` asks for the linear probe. Its keys are `probe` (a preset of
    `linear.PROBES`), `learning_rates`, `probe_epochs`, `probe_batch_size` and `probe_held_out` (a fraction of the
    fitting set). `bootstrap` is the number of resamples. `untrained` asks for the untrained encoder beside the trained
    one. `batch_size` is the number of images in a forward pass.

    Other evaluations add keys of their own, and override `names` and `measure`.
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
        """Return the names of what will be measured, as `classifier/fitted_on/split`.

        Raises:
            UserError: the data set lacks something that the evaluation needs.
        """
        if not dataset.classified:
            return []
        require_labels(dataset)
        fits = itertools.product(self.classifiers, fitting_sets(dataset), dataset.tests)
        return ["/".join(map(str, parts)) for parts in fits]

    def require(self, encoder: nn.Module) -> None:
        """Check the encoder before anything is measured.

        Raises:
            UserError: the encoder lacks something that the evaluation needs.
        """

    @property
    def classifiers(self) -> list[Classifier]:
        """The classifiers to fit."""
        neighbours = [Classifier(family="knn", preset=preset) for preset in self.knn]
        return neighbours + ([self.linear_classifier] if self.linear else [])

    @property
    def linear_classifier(self) -> Classifier:
        """The linear probe."""
        return Classifier(family="linear", preset="" if self.probe == "ours" else self.probe)

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
        """Evaluate `encoder`, and `untrained_encoder` if it is given and the config asks for it.

        Both map images (n, 3, S, S) to pooled features (n, c). They are moved to `device` and otherwise not changed.
        `seed` decides the held-out images, the order of the probe's images and the bootstrap, in the same way for both.

        Raises:
            UserError: a feature is not finite.
        """
        results, bootstrap = Results(), Bootstrap(self.bootstrap, seed)
        for name, network in both(encoder, untrained_encoder if self.untrained else None).items():
            task = Task(name, network, dataset, torch.device(device), seed, bootstrap, self.batch_size, extractor)
            self.measure(task, results)
        return results

    def measure(self, task: Task, results: Results) -> None:
        """Measure one encoder and add the findings to `results`."""
        dataset = task.dataset
        fitting = fitting_sets(dataset)
        features = {name: task.features(split, name) for name, split in {**fitting, **dataset.tests}.items()}
        results.features[task.encoder] = {name: values.cpu() for name, values in features.items()}
        first = next(iter(dataset.tests))
        results.records.add(HEALTH, *health(task, first, dataset.tests[first], features[first]))
        if not dataset.classified:
            return
        tests = {name: features[name] for name in dataset.tests}
        for fitted_on, split in fitting.items():
            for fit, scores in self.scores(task, fitted_on, features[fitted_on], split.labels, tests, results):
                record_tests(task, fit, scores, results)

    def scores(
        self,
        task: Task,
        fitted_on: str,
        bank: Tensor,
        labels: Tensor,
        tests: Mapping[str, Tensor],
        results: Results,
        fraction: float = 1.0,
    ) -> Iterator[tuple[Fit, dict[str, Tensor]]]:
        """Fit every classifier and yield it with its class scores (n, K) on the CPU, by the names in `tests`.

        `bank` (M, c) has `labels` (M,), a `fraction` of all labels. `tests` holds features (n, c). The choice of the
        probe's learning rate is added to `results`.
        """
        queries, classes = torch.cat(list(tests.values())), len(task.dataset.classes)
        scores, probe = self.fit(bank, labels.to(task.device), queries, classes, task.seed)
        for classifier, values in scores.items():
            fit = Fit(task.encoder, replace(classifier, fraction=fraction), fitted_on)
            if probe is not None and classifier.family == "linear":
                results.records.add(CHOICE, *choice(fit, probe.learning_rate, probe.held_out_accuracies))
            parts = torch.split(values.cpu(), [len(features) for features in tests.values()])
            yield fit, dict(zip(tests, parts, strict=True))

    def fit(
        self, bank: Tensor, labels: Tensor, queries: Tensor, classes: int, seed: int
    ) -> tuple[dict[Classifier, Tensor], LinearProbe | None]:
        """Return class scores (N, K) of `queries` (N, c) for every classifier fitted to `bank` (M, c), and the probe.

        The probe is None if the config does not ask for it. A negative label means none, and such images are left out.
        """
        labelled = labels >= 0  # STL-10 trains on unlabelled images too
        bank, labels = bank[labelled], labels[labelled]
        votes = knn_scores(bank, labels, queries, self.knn, classes)
        scores = {Classifier(family="knn", preset=preset): values for preset, values in votes.items()}
        if not self.linear:
            return scores, None
        probe = self.fit_probe(bank, labels, classes, seed)
        return {**scores, self.linear_classifier: probe(queries)}, probe

    def fit_probe(self, features: Tensor, labels: Tensor, classes: int, seed: int) -> LinearProbe:
        """Fit a linear probe with the settings of the config; see `linear.fit_linear_probe`."""
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
    """Return the splits that classifiers are fitted on, by name."""
    return {"train": dataset.train, **({} if dataset.balanced is None else {"balanced": dataset.balanced})}


def named_split(dataset: Dataset, name: str | None) -> str:
    """Return the name of the test split that `evaluation.split` asks for, by default the first.

    Raises:
        UserError: there is no such split.
    """
    if name is not None and name not in dataset.tests:
        raise UserError(f"evaluation.split={name} is not a test split; {suggestion(name, dataset.tests)}")
    return name or next(iter(dataset.tests))


def record_tests(task: Task, fit: Fit, scores: Mapping[str, Tensor], results: Results) -> None:
    """Record class scores (n, K) of all test splits, and the gaps between the splits."""
    dataset = task.dataset
    labels = {name: split.labels.cpu() for name, split in dataset.tests.items()}
    correct = {
        name: record(task, fit, name, scores[name], labels[name], results, name not in WITHOUT_OBJECT)
        for name in labels
    }
    gaps = background_gaps(correct, labels, dataset.chance, task.bootstrap, dataset.shifted)
    results.records.add(GAP, *(gap(fit, *splits, interval) for splits, interval in gaps.items()))


def record(
    task: Task, fit: Fit, split: str, scores: Tensor, labels: Tensor, results: Results, good: bool = True
) -> Tensor:
    """Record class `scores` (n, K) of images with `labels` (n,). Return bool (n,), true for correct predictions.

    `good` is false if a higher accuracy is not better.
    """
    predicted = scores.argmax(1)
    keep_predictions(fit, split, predicted, labels, results)
    record_accuracy(task, fit, split, scores, labels, results, good)
    results.records.by_class.append(by_class(fit, split, predicted, labels, task.dataset.classes))
    return predicted == labels


def record_accuracy(
    task: Task, fit: Fit, split: str, scores: Tensor, labels: Tensor, results: Results, good: bool = True
) -> None:
    """Record the accuracy of class `scores` (n, K) of images with `labels` (n,)."""
    interval = task.bootstrap.mean(scores.argmax(1) == labels)
    results.records.add(ACCURACY, accuracy(fit, split, interval, len(labels), good))
    results.records.add(TOP5, *top_five(fit, split, scores, labels))


def keep_predictions(fit: Fit, split: str, predicted: Tensor, labels: Tensor, results: Results) -> None:
    """Store predicted and true classes (n,) in `Results.predictions`."""
    results.predictions[f"labels/{split}"] = labels.numpy()
    results.predictions["/".join([*map(str, fit), split])] = predicted.numpy()


def accuracy(fit: Fit, split: str, interval: Interval, n: int, good: bool = True) -> Measurement:
    """Return the record of an accuracy in [0, 1] over n images; `good` is false if a higher one is not better."""
    better: Literal["more", "neither"] = "more" if good else "neither"
    record = partial(Measurement, kind=ACCURACY.kind, split=split, n=n, better=better)
    return record(**interval._asdict(), **fit._asdict())


def gap(fit: Fit, split: str, minus: str, interval: Interval) -> Measurement:
    """Return the record of a difference of accuracies in [-1, 1], in percentage points."""
    points = {name: 100 * value for name, value in interval._asdict().items()}
    record = partial(Measurement, kind=GAP.kind, split=split, minus=minus, unit="points", better="less")
    return record(**points, **fit._asdict())


def both(encoder: nn.Module, untrained: nn.Module | None) -> dict[str, nn.Module]:
    """Return the encoders by the names that they have in records."""
    return {TRAINED: encoder, **({} if untrained is None else {UNTRAINED: untrained})}


def top_five(fit: Fit, split: str, scores: Tensor, labels: Tensor) -> list[Measurement]:
    """Return the record of the top-5 accuracy of class `scores` (n, K); none for five classes or fewer.

    kNN does not predict a class without votes, even among its best five.
    """
    if scores.shape[1] <= 5:
        return []
    hits = in_top(scores, labels, 5)
    if fit.classifier.family == "knn":
        hits &= scores.gather(1, labels[:, None])[:, 0] > 0
    value = hits.float().mean().item()
    return [Measurement(kind=TOP5.kind, split=split, value=value, n=len(labels), **fit._asdict())]


def by_class(fit: Fit, split: str, predicted: Tensor, labels: Tensor, classes: Sequence[str]) -> ByClass:
    """Return the record of the accuracies by class, from predicted and true classes (n,)."""
    matrix = confusion(predicted, labels, len(classes))
    return ByClass(
        **fit._asdict(),
        split=split,
        accuracies=per_class(matrix),
        confused=[[classes[true], classes[taken], n] for true, taken, n in most_confused(matrix, 10)],
        confusion=matrix.tolist() if len(classes) <= LARGEST_MATRIX else None,
    )


def health(task: Task, name: str, split: Split, features: Tensor) -> list[Measurement]:
    """Measure the health of the `features` (N, c) of a split, on up to `LOOKED_AT` of them, spread evenly."""
    index = torch.linspace(0, len(features) - 1, min(LOOKED_AT, len(features))).round().long()
    seen = features[index.to(features.device)]
    views = [crops(Some(split, index[:: -(-len(index) // CROPPED)]), view, task.seed, task.device) for view in (0, 1)]
    first, second = (task.features(view, f"crops of {name}") for view in views)
    found = {measure.__name__: measure(seen) for measure in (effective_rank, feature_std, spread)}
    found = {"channels": seen.shape[1], **found, "alignment": alignment(first, second)}
    return [
        Measurement(
            kind=HEALTH.kind,
            metric=metric,
            value=value if math.isfinite(value) else None,
            n=len(seen),
            unit="count" if metric == "channels" else "number",
            encoder=task.encoder,
            split=name,
        )
        for metric, value in found.items()
    ]


def choice(
    fit: Fit, chosen: float, held_out: Mapping[float, float], grid: str = "learning_rates"
) -> Iterator[Measurement]:
    """Yield records of the chosen learning rate, and of the held-out accuracies in [0, 1] that chose it."""
    at_edge = len(held_out) > 1 and chosen in (min(held_out), max(held_out))
    note = f"The chosen learning rate {chosen:g} lies at the edge of the grid: widen evaluation.{grid}."
    yield Measurement(
        kind=CHOICE.kind, metric="chosen", value=chosen, unit="number", note=note if at_edge else "", **fit._asdict()
    )
    for rate, accuracy in held_out.items():
        factors = {"learning_rate": rate}
        yield Measurement(kind=CHOICE.kind, metric="held_out", value=accuracy, factors=factors, **fit._asdict())
