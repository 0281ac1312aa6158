"""Accuracy under corruptions, on the flat images of conftest.py."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.cache import split_identity
from icl_msr.evaluation.corruptions import corrupt
from icl_msr.evaluation.shift import Corrupted, CorruptionRobustness
from icl_msr.evaluation.subsets import Some
from icl_msr.evaluation.suite import Results

Make = Callable[..., CorruptionRobustness]


@pytest.fixture
def make() -> Make:
    def build(**keys: Any) -> CorruptionRobustness:
        standard: dict[str, Any] = {
            "knn": ["dino"],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-1],
            "probe_epochs": 5,
            "probe_batch_size": 64,
            "probe_held_out": 0.2,
            "bootstrap": 100,
            "untrained": True,
            "batch_size": 64,
            "corruptions": ["brightness", "gaussian_noise"],
            "severities": [5, 1, 3],
            "images": 50,
            "split": None,
            "shifted": False,
        }
        return CorruptionRobustness(**(standard | keys))

    return build


def rows(results: Results, classifier: str = "linear", encoder: str = "trained") -> dict[tuple[str, int | str], Any]:
    found = results.records.where("corruption", classifier=classifier, encoder=encoder)
    return {(row.told("corruption"), row.told("severity")): row for row in found}


def test_what_is_measured(make: Make, dataset: Dataset, object_encoder: nn.Module) -> None:
    evaluation = make()
    results = evaluation(object_encoder, dataset, device="cpu", seed=0, untrained_encoder=object_encoder)
    json.dumps(results.records.to_json(), allow_nan=False)
    found = rows(results)
    assert list(found) == [
        *(("gaussian_noise", severity) for severity in (1, 3, 5)),
        *(("brightness", severity) for severity in (1, 3, 5)),
        *(("gaussian_noise", "mean"), ("brightness", "mean"), ("mean", "mean")),
    ]
    assert all(row.n == 50 and row.low <= row.value <= row.high for row in found.values())
    for name in ("brightness", "gaussian_noise"):
        each = [found[name, severity].value for severity in (1, 3, 5)]
        assert found[name, "mean"].value == pytest.approx(np.mean(each))
    assert found["mean", "mean"].value == pytest.approx(
        np.mean([found[name, "mean"].value for name in ("brightness", "gaussian_noise")])
    )
    # A class is a grey level, which brightness changes.
    assert found["brightness", 5].value < 0.6 < found["gaussian_noise", 1].value
    by_split = {row.split: row for row in results.records.where("accuracy", classifier="linear")}
    assert by_split["clean"].value == 1
    assert by_split["corrupted"].value == found["mean", "mean"].value
    names = {record.name for record in results.records.where("accuracy")}
    assert names == set(evaluation.names(dataset))
    (gap,) = results.records.where("gap", classifier="linear", encoder="trained")
    assert gap.value == pytest.approx(100 * (1 - found["mean", "mean"].value), abs=1e-4)
    assert gap.low <= gap.value <= gap.high  # type: ignore[operator]
    predicted, labels = (results.predictions[key] for key in ("trained/linear/train/corrupted", "labels/corrupted"))
    assert np.mean(predicted == labels) == pytest.approx(found["mean", "mean"].value)


def test_the_loss_is_counted_from_the_clean_images(make: Make, dataset: Dataset, object_encoder: nn.Module) -> None:
    results = make(severities=[5], knn=[])(object_encoder, dataset, device="cpu", seed=0)
    found = rows(results)
    assert found["gaussian_noise", 5].value < 1
    (gap,) = results.records.where("gap")
    assert gap.value == pytest.approx(100 * (1 - found["mean", "mean"].value), abs=1e-4)


def test_shifted_splits_beside_the_corruptions(make: Make, dataset: Dataset, background_encoder: nn.Module) -> None:
    """An encoder of the background fails where the background is another image's."""
    dataset.shifted = ("mixed_same", "mixed_rand")
    alone = make(images=200)(background_encoder, dataset, device="cpu", seed=0)
    evaluation = make(images=200, shifted=True)
    found = evaluation(background_encoder, dataset, device="cpu", seed=0)
    assert found.records.where("corruption") == alone.records.where("corruption")
    linear = {row.split: row for row in found.records.where("accuracy", classifier="linear")}
    assert list(linear) == ["clean", "corrupted", "mixed_same", "mixed_rand"]
    assert {record.name for record in found.records.where("accuracy")} == set(evaluation.names(dataset))
    assert (linear["clean"].value, linear["mixed_same"].value) == (1, 1)
    predicted = found.predictions["trained/linear/train/mixed_rand"]
    right = np.mean(predicted == dataset.tests["mixed_rand"].labels.numpy())
    assert linear["mixed_rand"].value == pytest.approx(right)
    assert right < 0.5
    gaps = {gap.splits: gap.value for gap in found.records.where("gap", classifier="linear")}
    assert list(gaps) == ["clean - corrupted", "clean - mixed_same", "clean - mixed_rand"]
    assert gaps["clean - mixed_rand"] == pytest.approx(100 * (1 - right))


def test_a_shifted_split_with_a_name_that_is_taken(make: Make, dataset: Dataset) -> None:
    dataset.tests = {**dataset.tests, "corrupted": dataset.tests["original"]}
    dataset.shifted = ("corrupted",)
    with pytest.raises(UserError, match=r"dataset.shifted.corrupted has a name that the evaluation uses itself"):
        make(shifted=True).names(dataset)
    assert make().names(dataset)


def test_images_are_those_of_the_corruption(dataset: Dataset) -> None:
    clean = Some(dataset.tests["original"], torch.tensor([4, 9, 100]))
    variants = [("brightness", 2), ("gaussian_noise", 4)]
    shown = Corrupted(clean, variants, seed=7, device=torch.device("cpu"))  # type: ignore[arg-type]
    assert len(shown) == 6
    assert torch.equal(shown.labels, dataset.tests["original"].labels[[4, 9, 100] * 2])
    images = dataset.tests["original"].load(clean.index)
    expected = torch.cat([corrupt(images, *v, seed=7, index=clean.index) for v in variants])  # type: ignore[arg-type]
    assert torch.equal(shown.load(torch.arange(6)), expected)
    assert torch.equal(shown.load(torch.tensor([5, 0])), expected[[5, 0]])
    identities = {
        split_identity(Corrupted(part, chosen, seed, torch.device("cpu")))  # type: ignore[arg-type]
        for part in (clean, Some(dataset.tests["original"], torch.tensor([4, 9, 101])))
        for chosen in (variants, variants[:1])
        for seed in (7, 8)
    }
    assert len(identities) == 8


def test_batch_size_does_not_matter(make: Make, dataset: Dataset, object_encoder: nn.Module) -> None:
    one = make()(object_encoder, dataset, device="cpu", seed=3).records
    assert make(batch_size=7)(object_encoder, dataset, device="cpu", seed=3).records == one


def test_a_split_that_is_not_there(make: Make, dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"evaluation.split=orignal is not a test split; did you mean original?"):
        make(split="orignal").names(dataset)
