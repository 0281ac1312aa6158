"""The evaluation at the end of a run: every encoder x classifier x fitting set x test split, and the gaps between them.

It knows nothing of training: encoders and a data set in, plain records out.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.background import background_gaps
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import PresetName, knn_scores
from icl_msr.evaluation.linear import LinearProbe, fit_linear_probe
from icl_msr.evaluation.metrics import Bootstrap

Fraction = Annotated[float, Field(gt=0, lt=1)]


class _Row(TypedDict):
    encoder: str
    """`trained` or `untrained`."""
    classifier: str
    """`linear` or `knn-<preset>`."""
    fitted_on: str
    """`train` or `balanced`."""


class Accuracy(_Row):
    """Top-1 accuracy on one test split, in [0, 1], with its 95 % interval over n images."""

    split: str
    top1: float
    low: float
    high: float
    n: int


class Gap(_Row):
    """A difference between test splits in percentage points, with its 95 % interval; see `background.GAPS`."""

    gap: str
    points: float
    low: float
    high: float


class Choice(TypedDict):
    """The learning rate of a linear probe, and the held-out accuracies (in [0, 1]) that chose it."""

    encoder: str
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
    predictions: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Predicted classes (n,) under `encoder/classifier/fitted_on/split`, and true ones under `labels/split`: what
    `numpy.savez` takes, for paired comparisons between runs."""
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """float32 (N, c) on the CPU, by encoder and split (`train`, `balanced` and the test splits)."""

    def records(self) -> dict[str, Any]:
        """The plain-data part, ready for JSON: `accuracies`, `gaps` and `probes`."""
        return {"accuracies": self.accuracies, "gaps": self.gaps, "probes": self.choices}


class Evaluation:
    """kNN and linear probes on cached features, fitted on the train split and on the balanced one.

    Config keys: `knn` names the kNN presets; `linear` asks for the linear probe, whose keys are `learning_rates`,
    `probe_epochs`, `probe_batch_size` and `probe_held_out` (a fraction of the fitting set); `bootstrap`
    is the number of resamples; `untrained` asks for the untrained encoder beside the trained one; `batch_size` is
    the number of images in a forward pass.
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
    ) -> None:
        self.knn = knn
        self.linear = linear
        self.fit_probe = partial(
            fit_linear_probe,
            learning_rates=learning_rates,
            epochs=probe_epochs,
            batch_size=probe_batch_size,
            held_out=probe_held_out,
        )
        self.bootstrap = bootstrap
        self.untrained = untrained
        self.batch_size = batch_size

    def names(self, dataset: Dataset) -> list[str]:
        """What will be measured: `classifier/fitted_on/split`."""
        classifiers = [*(f"knn-{preset}" for preset in self.knn), *(["linear"] if self.linear else [])]
        fitted_on = ["train", *([] if dataset.balanced is None else ["balanced"])]
        return ["/".join(parts) for parts in itertools.product(classifiers, fitted_on, dataset.tests)]

    def __call__(
        self,
        encoder: nn.Module,
        dataset: Dataset,
        *,
        device: torch.device | str,
        seed: int,
        untrained_encoder: nn.Module | None = None,
    ) -> Results:
        """Evaluate `encoder`, and `untrained_encoder` if given and asked for; both map images to pooled features.

        Both are moved to `device` and otherwise left as they are. `seed` decides the held-out images, the probe's
        order of images and the bootstrap, all of them the same for both encoders.

        Raises:
            UserError: a feature is not finite.
        """
        results = Results()
        results.predictions = {f"labels/{name}": split.labels.cpu().numpy() for name, split in dataset.tests.items()}
        encoders = {"trained": encoder}
        if self.untrained and untrained_encoder is not None:
            encoders["untrained"] = untrained_encoder
        for name, network in encoders.items():
            self._evaluate(name, network, dataset, torch.device(device), seed, results)
        return results

    def _evaluate(
        self, name: str, encoder: nn.Module, dataset: Dataset, device: torch.device, seed: int, results: Results
    ) -> None:
        fitting: dict[str, Split] = {"train": dataset.train}
        if dataset.balanced is not None:
            fitting["balanced"] = dataset.balanced
        features = results.features[name] = {
            split_name: extract(
                encoder,
                split,
                mean=dataset.mean,
                std=dataset.std,
                device=device,
                batch_size=self.batch_size,
                label=f"{name} features of {split_name}",
            )
            for split_name, split in (fitting | dict(dataset.tests)).items()
        }
        labels = {split_name: split.labels.cpu() for split_name, split in dataset.tests.items()}
        queries = torch.cat([features[split_name] for split_name in labels]).to(device)
        bootstrap = Bootstrap(self.bootstrap, seed)

        for fitted_on, split in fitting.items():
            scores: dict[str, Tensor] = {}
            labelled = split.labels.cpu() >= 0  # STL-10 trains on unlabelled images too
            bank = features[fitted_on][labelled].to(device)
            bank_labels = split.labels.cpu()[labelled].to(device)
            classes = len(dataset.classes)
            for preset, votes in knn_scores(bank, bank_labels, queries, self.knn, classes).items():
                scores[f"knn-{preset}"] = votes
            if self.linear:
                probe = self.fit_probe(bank, bank_labels, classes, seed=seed)
                scores["linear"] = probe(queries)
                results.choices.append(_choice(name, fitted_on, probe))
            for classifier, values in scores.items():
                row = _Row(encoder=name, classifier=classifier, fitted_on=fitted_on)
                sizes = [len(target) for target in labels.values()]
                predictions = dict(zip(labels, torch.split(values.argmax(1).cpu(), sizes), strict=True))
                for split_name, predicted in predictions.items():
                    results.predictions[f"{name}/{classifier}/{fitted_on}/{split_name}"] = predicted.numpy()
                self._measure(row, predictions, labels, dataset.chance, bootstrap, results)

    @staticmethod
    def _measure(
        row: _Row,
        predictions: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        chance: float,
        bootstrap: Bootstrap,
        results: Results,
    ) -> None:
        correct = {split: predicted == labels[split] for split, predicted in predictions.items()}
        for split, hits in correct.items():
            top1, low, high = bootstrap.mean(hits)
            results.accuracies.append(Accuracy(**row, split=split, top1=top1, low=low, high=high, n=len(hits)))
        for gap, interval in background_gaps(correct, labels, chance, bootstrap).items():
            points, low, high = (100 * value for value in interval)
            results.gaps.append(Gap(**row, gap=gap, points=points, low=low, high=high))


def _choice(encoder: str, fitted_on: str, probe: LinearProbe) -> Choice:
    rate = f"{probe.learning_rate:g}"
    note = f"The chosen learning rate {rate} lies at the edge of the grid: widen evaluation.learning_rates."
    return Choice(
        encoder=encoder,
        fitted_on=fitted_on,
        learning_rate=probe.learning_rate,
        held_out_accuracies={f"{rate:g}": accuracy for rate, accuracy in probe.held_out_accuracies.items()},
        note=note if probe.at_edge else "",
    )
