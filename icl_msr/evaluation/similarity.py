"""Similarity of the features of two encoders on the same test images, independent of the features' axes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.core.records import Layout, Measurement
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.health import linear_cka
from icl_msr.evaluation.knn import neighbours
from icl_msr.evaluation.subject import find
from icl_msr.evaluation.suite import Extractor, Results, both

SIMILARITY = Layout(
    kind="similarity",
    title="Similarity to another encoder",
    rows=("encoder", "other", "split"),
    labels={"other": "and", "split": "images of", "cka": "CKA", "shared_neighbours": "shared neighbours, %"},
    details={"cka": "1: equal up to rotation and scale", "chance": "for unrelated features"},
    count="n",
)


class Similarity:
    """CKA and shared nearest neighbours of the encoder and another one.

    Config keys: `other` is a run's folder, a .safetensors file, timm:<name> or torchvision:<name>. `split` names a
    test split; null is the first. `neighbours` is the number of neighbours of each image. `batch_size` is the number
    of images in a forward pass. `untrained` asks for the untrained encoder beside the trained one.
    """

    def __init__(
        self, *, other: str, split: str | None, neighbours: PositiveInt, batch_size: PositiveInt, untrained: bool
    ) -> None:
        self.subject = find("run" if Path(other).is_dir() else "encoder", other, None)
        self.split, self.neighbours, self.batch_size, self.untrained = split, neighbours, batch_size, untrained

    def names(self, dataset: Dataset) -> list[str]:
        """Return the names of the measures, as `measure/split`.

        Raises:
            UserError: there is no such split, it has too few images, or the other encoder cannot take the images.
        """
        split = next(iter(dataset.tests)) if self.split is None else self.split
        if split not in dataset.tests:
            raise UserError(
                f"{dataset.name} has no test split {split}; set evaluation.split to one of {', '.join(dataset.tests)}."
            )
        if len(dataset.tests[split]) <= self.neighbours + 1:
            raise UserError(
                f"{split} has {len(dataset.tests[split])} images, too few for {self.neighbours} neighbours of each; "
                "set evaluation.neighbours lower."
            )
        self.subject.fitting(dataset.image_size, 0)
        return [f"{measure}/{split}" for measure in ("cka", "shared_neighbours")]

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
        """Compare `encoder`, and `untrained_encoder` if given and asked for, with the other one."""
        results, (name, *_) = Results(), self.names(dataset)
        split = name.partition("/")[2]
        subject = self.subject
        there = subject.fitting(dataset.image_size, seed)

        def features(network: nn.Module, data: Dataset, label: str) -> Tensor:
            return extractor(
                network,
                data.tests[split],
                mean=data.mean,
                std=data.std,
                device=device,
                batch_size=self.batch_size,
                label=f"{label} features of {split}",
            ).to(device)

        # Each encoder gets images that are normalised as in its training.
        mean, std = (tuple(map(float, values)) for values in (subject.mean, subject.std))
        others = features(there, replace(dataset, mean=mean, std=std), subject.name)  # type: ignore[arg-type]
        for label, network in both(encoder, untrained_encoder if self.untrained else None).items():
            ours = features(network, dataset, label)
            record = partial(Measurement, kind=SIMILARITY.kind, encoder=label, split=split, n=len(ours))
            record = partial(record, factors={"other": subject.name})
            shared = shared_neighbours(ours, others, self.neighbours)
            results.records.add(
                SIMILARITY,
                record(metric="cka", value=linear_cka(ours, others), unit="number"),
                record(metric="shared_neighbours", value=shared),
                record(metric="chance", value=self.neighbours / (len(ours) - 1)),
            )
        return results


def shared_neighbours(first: Tensor, second: Tensor, k: int) -> float:
    """Return the mean share of an image's k nearest neighbours (by cosine) that (N, c) and (N, d) have in common."""
    near = [neighbours(features, features, k + 1, normalised=True)[1] for features in (first, second)]
    itself = torch.arange(len(first), device=first.device)[:, None]
    mine, theirs = (index.masked_fill(index == itself, -1 - number) for number, index in enumerate(near))
    return float((mine[:, :, None] == theirs[:, None, :]).sum() / (k * len(first)))
