import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.core.records import Records
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation import suite
from icl_msr.evaluation.background import background_gaps
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.health import alignment, effective_rank, feature_std, spread
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.subsets import crops
from icl_msr.evaluation.suite import Evaluation, Results
from icl_msr.models.backbones import tiny


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        knn=["wmse", "dino"],
        linear=True,
        probe="ours",
        learning_rates=[1e-2, 1e-1],
        probe_epochs=10,
        probe_batch_size=64,
        probe_held_out=0.2,
        bootstrap=200,
        untrained=True,
        batch_size=64,
    )


def gaps(results: Results, classifier: str, fitted_on: str) -> dict[str, float]:
    rows = results.records.where("gap", classifier=classifier, fitted_on=fitted_on, encoder="trained")
    return {gap.splits: gap.value for gap in rows if gap.value is not None}


@pytest.mark.parametrize("classifier", ["linear", "knn-wmse", "knn-dino"])
def test_an_encoder_that_sees_the_background_alone(
    evaluation: Evaluation, dataset: Dataset, background_encoder: nn.Module, classifier: str
) -> None:
    results = evaluation(background_encoder, dataset, device="cpu", seed=0)
    found = gaps(results, classifier, "train")
    assert found.keys() == {
        "mixed_same - mixed_rand",
        "original - mixed_rand",
        "original - only_fg",
        "only_bg - chance",
    }
    assert found["mixed_same - mixed_rand"] > 60
    assert found["original - mixed_rand"] == found["mixed_same - mixed_rand"]
    assert found["original - only_fg"] > 60
    assert found["only_bg - chance"] == pytest.approx(75)
    # Nothing of the object is in its features: a probe on balanced data finds nothing either.
    balanced = results.records.find("accuracy", classifier=classifier, fitted_on="balanced", split="mixed_rand")
    assert balanced is not None
    assert balanced.value is not None
    assert balanced.value < 0.45


def test_an_encoder_that_sees_the_object_alone(
    evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module
) -> None:
    results = evaluation(object_encoder, dataset, device="cpu", seed=0)
    for fitted_on in ("train", "balanced"):
        found = gaps(results, "linear", fitted_on)
        assert found["mixed_same - mixed_rand"] == found["original - only_fg"] == 0
        assert found["only_bg - chance"] < 15


def test_records_are_complete_plain_and_agree_with_the_predictions(
    evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module, background_encoder: nn.Module
) -> None:
    results = evaluation(object_encoder, dataset, device="cpu", seed=0, untrained_encoder=background_encoder)
    json.dumps(results.records.to_json(), allow_nan=False)
    accuracies = results.records.where("accuracy")
    assert len(accuracies) == 2 * 3 * 2 * 5  # encoders, classifiers, fitting sets, splits
    assert len(results.records.where("choice", metric="chosen")) == 2 * 2
    assert len(results.records.where("choice", metric="held_out")) == 2 * 2 * 2
    for row in accuracies:
        name = f"{row.encoder}/{row.name}"
        assert name == f"{row.encoder}/{row.classifier}/{row.fitted_on}/{row.split}"
        predicted, labels = results.predictions[name], results.predictions[f"labels/{row.split}"]
        assert row.value == pytest.approx(np.mean(predicted == labels))
        assert row.low <= row.value <= row.high  # type: ignore[operator]
        assert row.n == 200
    assert results.features["untrained"].keys() == {"train", "balanced", *dataset.tests}
    assert results.features["trained"]["train"].shape == (400, 24)


def test_without_a_balanced_split_and_without_background_splits(
    evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module
) -> None:
    dataset.balanced = None
    dataset.tests = {"test": dataset.tests["original"]}
    results = evaluation(object_encoder, dataset, device="cpu", seed=0)
    assert {row.fitted_on for row in results.records.where("accuracy")} == {"train"}
    assert results.records.where("gap") == []


def test_batch_size_does_not_matter(evaluation: Evaluation, dataset: Dataset, background_encoder: nn.Module) -> None:
    results = evaluation(background_encoder, dataset, device="cpu", seed=0)
    evaluation.batch_size = 9
    assert evaluation(background_encoder, dataset, device="cpu", seed=0).records == results.records


def test_batches_of_one_and_two_images(evaluation: Evaluation, dataset: Dataset) -> None:
    """Of a network whose convolutions may round otherwise: all metrics that count images are identical."""
    torch.manual_seed(0)
    network = tiny(32, weights=None)
    dataset.tests = {"original": dataset.tests["original"]}
    dataset.balanced = None
    found = []
    for batch_size in (1, 2):
        evaluation.batch_size = batch_size
        found.append(evaluation(network, dataset, device="cpu", seed=0).records)
    one, two = found
    assert one.by_class == two.by_class
    for kind in ("accuracy", "gap", "choice"):
        assert one.where(kind) == two.where(kind)
    for key in ("effective_rank", "feature_std", "spread"):
        a, b = (records.find("health", metric=key) for records in found)
        assert a.value == pytest.approx(b.value, rel=1e-4)  # type: ignore[union-attr]


def test_classes_and_their_confusions(evaluation: Evaluation, dataset: Dataset, background_encoder: nn.Module) -> None:
    results = evaluation(background_encoder, dataset, device="cpu", seed=0)
    assert results.records.where("top5") == []  # of four classes
    accuracies, by_class = results.records.where("accuracy"), results.records.by_class
    assert len(by_class) == len(accuracies)
    for row, accuracy in zip(by_class, accuracies, strict=True):
        assert all(getattr(row, k) == getattr(accuracy, k) for k in ("encoder", "classifier", "fitted_on", "split"))
        predicted, labels = (results.predictions[k] for k in (f"trained/{accuracy.name}", f"labels/{row.split}"))
        assert np.array_equal(row.confusion, confusion_matrix(labels, predicted, labels=range(4)))  # type: ignore[arg-type]
        assert row.accuracies == pytest.approx(recall_score(labels, predicted, average=None))
        if row.confused:
            true, taken, n = row.confused[0]
            wrong = np.array(row.confusion) * (1 - np.eye(4))
            assert n == wrong.max() == wrong[int(true), int(taken)]


def test_top5(evaluation: Evaluation, blobs: Callable[..., tuple[Tensor, Tensor]]) -> None:
    (bank, labels), (queries, targets) = blobs(500, seed=1), blobs(300, seed=2)
    scores, _ = evaluation.fit(bank, labels, queries, 10, seed=0)
    for classifier, values in scores.items():
        (found,) = suite.top_five(suite.Fit("trained", classifier, "train"), "test", values, targets)
        best = values.double() - 1e-9 * torch.arange(10)  # ties as ours
        expected = top_k_accuracy_score(targets, best, k=5, labels=range(10))
        if classifier.family == "linear":
            assert found.value == pytest.approx(expected)
        else:  # classes without a vote are no answer
            voted = values.gather(1, targets[:, None])[:, 0] > 0
            right = [
                int(t) in row[:5] and v
                for t, row, v in zip(targets, best.argsort(descending=True).tolist(), voted, strict=True)
            ]
            assert found.value == pytest.approx(np.mean(right))
        assert found.value is not None
        assert (values.argmax(1) == targets).float().mean() < found.value < 1


def test_health_of_every_encoder(evaluation: Evaluation, dataset: Any) -> None:
    class Collapsed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 5)

    torch.manual_seed(0)
    first = dataset.tests["original"]
    first.images = torch.randint(256, first.images.shape, dtype=torch.uint8)  # crops of flat images are all the same
    network = tiny(32, weights=None)
    known: Any = {"mean": dataset.mean, "std": dataset.std, "batch_size": 64}
    results = evaluation(network, dataset, device="cpu", seed=0, untrained_encoder=Collapsed())
    trained, collapsed = (
        {record.metric: record for record in results.records.where("health", encoder=encoder)}
        for encoder in ("trained", "untrained")
    )
    features = results.features["trained"]["original"]
    assert {(record.n, record.split) for record in trained.values()} == {(200, "original")}
    assert suite.CROPPED >= 200
    views = [extract(network, crops(first, view, 0, torch.device("cpu")), device="cpu", **known) for view in (0, 1)]
    assert {metric: record.value for metric, record in trained.items()} == {
        "channels": features.shape[1],
        "effective_rank": effective_rank(features), "feature_std": feature_std(features), "spread": spread(features),
        "alignment": alignment(*views),
    }  # fmt: skip
    assert 0 < alignment(*views) < 2
    assert collapsed["effective_rank"].value is None
    assert collapsed["feature_std"].value == 0
    json.dumps(results.records.to_json(), allow_nan=False)


def test_two_evaluations_together(evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module) -> None:
    one = evaluation(object_encoder, dataset, device="cpu", seed=0)
    rows = json.dumps(one.records.to_json())
    one.join(evaluation(object_encoder, dataset, device="cpu", seed=0))
    assert json.dumps(one.records.to_json()) == rows
    other = Results(Records([replace(one.records.where("health")[0], split="fog")]))
    one.join(other)
    assert list(dict.fromkeys(row.split for row in one.records.where("health"))) == ["original", "fog"]


def test_what_is_written_is_read_again(evaluation: Evaluation, dataset: Dataset, object_encoder: nn.Module) -> None:
    records = evaluation(object_encoder, dataset, device="cpu", seed=0).records
    again = Records.from_json(json.loads(json.dumps(records.to_json())))
    assert again.rows() == records.rows()
    assert (again.by_class, again.layouts) == (records.by_class, records.layouts)
    assert records.by_class


def test_full_and_foreground_and_splits_of_other_objects() -> None:
    full, fg = torch.tensor([True] * 80 + [False] * 20), torch.tensor([True] * 50 + [False] * 50)
    labels, bootstrap = torch.arange(100) % 5, Bootstrap(500, seed=0)
    aligned = background_gaps({"full": full, "fg": fg}, {"full": labels, "fg": labels}, 0.2, bootstrap)
    assert aligned.keys() == {("full", "fg")}
    assert aligned["full", "fg"].value == pytest.approx(0.3)
    correct, places = {"full": full, "sketch": fg}, {"full": labels, "sketch": labels.flip(0)}
    shifted = background_gaps(correct, places, 0.2, bootstrap, shifted=["sketch"])
    assert shifted.keys() == {("full", "sketch")}
    assert shifted["full", "sketch"].value == pytest.approx(0.3)
    other = background_gaps({"full": full, "fg": fg}, {"full": labels, "fg": labels.flip(0)}, 0.2, bootstrap)
    pair = ("full", "fg")
    assert other[pair].high - other[pair].low > 1.2 * (aligned[pair].high - aligned[pair].low)


def test_a_training_set_without_labels_is_refused_before_any_work(evaluation: Evaluation, dataset: Dataset) -> None:
    dataset.train.labels[:] = -1
    with pytest.raises(UserError, match=r"no training images with a label.*evaluation=none"):
        evaluation.names(dataset)
