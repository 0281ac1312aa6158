import json

import numpy as np
import pytest
import torch
from torch import nn

from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.background import background_gaps
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.suite import Evaluation, Results


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        knn=["wmse", "dino"],
        linear=True,
        learning_rates=[1e-2, 1e-1],
        probe_epochs=10,
        probe_batch_size=64,
        probe_held_out=0.2,
        bootstrap=200,
        untrained=True,
        batch_size=64,
    )


def gaps(results: Results, classifier: str, fitted_on: str) -> dict[str, float]:
    rows = [gap for gap in results.gaps if gap["classifier"] == classifier and gap["fitted_on"] == fitted_on]
    return {gap["gap"]: gap["points"] for gap in rows if gap["encoder"] == "trained"}


@pytest.mark.parametrize("classifier", ["linear", "knn-wmse", "knn-dino"])
def test_an_encoder_that_sees_the_background_alone(
    evaluation: Evaluation, dataset: Dataset, background_encoder: nn.Module, classifier: str
) -> None:
    results = evaluation(background_encoder, dataset, device="cpu", seed=0)
    found = gaps(results, classifier, "train")
    assert found.keys() == {"bg_gap", "original - mixed_rand", "original - only_fg", "only_bg - chance"}
    assert found["bg_gap"] > 60
    assert found["original - mixed_rand"] == found["bg_gap"]
    assert found["original - only_fg"] > 60
    assert found["only_bg - chance"] == pytest.approx(75)
    # Nothing of the object is in its features: a probe on balanced data finds nothing either.
    by_split = {
        row["split"]: row["top1"]
        for row in results.accuracies
        if row["classifier"] == classifier and row["fitted_on"] == "balanced"
    }
    assert by_split["mixed_rand"] < 0.45


def test_an_encoder_that_sees_the_object_alone(
    evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module
) -> None:
    results = evaluation(object_encoder, dataset, device="cpu", seed=0)
    for fitted_on in ("train", "balanced"):
        found = gaps(results, "linear", fitted_on)
        assert found["bg_gap"] == found["original - only_fg"] == 0
        assert found["only_bg - chance"] < 15


def test_records_are_complete_plain_and_agree_with_the_predictions(
    evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module, background_encoder: nn.Module
) -> None:
    results = evaluation(object_encoder, dataset, device="cpu", seed=0, untrained_encoder=background_encoder)
    json.dumps(results.records(), allow_nan=False)
    assert len(results.accuracies) == 2 * 3 * 2 * 5  # encoders, classifiers, fitting sets, splits
    assert len(results.choices) == 2 * 2
    for row in results.accuracies:
        name = f"{row['encoder']}/{row['classifier']}/{row['fitted_on']}/{row['split']}"
        predicted, labels = results.predictions[name], results.predictions[f"labels/{row['split']}"]
        assert row["top1"] == pytest.approx(np.mean(predicted == labels))
        assert row["low"] <= row["top1"] <= row["high"]
        assert row["n"] == 200
    assert results.features["untrained"].keys() == {"train", "balanced", *dataset.tests}
    assert results.features["trained"]["train"].shape == (400, 24)


def test_without_a_balanced_split_and_without_background_splits(
    evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module
) -> None:
    dataset.balanced = None
    dataset.tests = {"test": dataset.tests["original"]}
    results = evaluation(object_encoder, dataset, device="cpu", seed=0)
    assert {row["fitted_on"] for row in results.accuracies} == {"train"}
    assert results.gaps == []


def test_batch_size_does_not_matter(evaluation: Evaluation, dataset: Dataset, background_encoder: nn.Module) -> None:
    results = evaluation(background_encoder, dataset, device="cpu", seed=0)
    evaluation.batch_size = 9
    assert evaluation(background_encoder, dataset, device="cpu", seed=0).records() == results.records()


def test_full_and_foreground_and_splits_of_other_objects() -> None:
    full, fg = torch.tensor([True] * 80 + [False] * 20), torch.tensor([True] * 50 + [False] * 50)
    labels, bootstrap = torch.arange(100) % 5, Bootstrap(500, seed=0)
    aligned = background_gaps({"full": full, "fg": fg}, {"full": labels, "fg": labels}, 0.2, bootstrap)
    assert aligned.keys() == {"full - fg"}
    assert aligned["full - fg"].value == pytest.approx(0.3)
    other = background_gaps({"full": full, "fg": fg}, {"full": labels, "fg": labels.flip(0)}, 0.2, bootstrap)
    assert other["full - fg"].high - other["full - fg"].low > 1.2 * (
        aligned["full - fg"].high - aligned["full - fg"].low
    )
