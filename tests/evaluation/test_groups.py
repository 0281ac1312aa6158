"""Accuracy by group, against pandas, and the group-balanced probe against scikit-learn."""

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.data.confounded import confounded
from icl_msr.data.dataset import ArraySplit, Attribute, Dataset
from icl_msr.evaluation.groups import BALANCED, METRICS, Groups, balanced_groups
from icl_msr.evaluation.metrics import Bootstrap

Make = Callable[..., Groups]
SIZE = 8


@pytest.fixture
def make() -> Make:
    def build(**keys: Any) -> Groups:
        standard: dict[str, Any] = {
            "knn": [],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-1],
            "probe_epochs": 60,
            "probe_batch_size": 64,
            "probe_held_out": 0.2,
            "bootstrap": 200,
            "untrained": True,
            "batch_size": 64,
            "split": None,
            "balanced_from": "train",
            "subsets": 3,
            "fewest": 1,
        }
        return Groups(**(standard | keys))

    return build


def split(labels: Tensor, places: Tensor, seed: int) -> ArraySplit:
    """Images whose upper half shows the class faintly, and whose lower half shows the place clearly, both noisy."""
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed))
    upper, lower = (110 + torch.stack([20 * labels, 60 * places], 1) + 8 * noise).round().byte().unbind(1)
    images = upper[:, None, None, None].repeat(1, 3, SIZE, SIZE)
    images[:, :, SIZE // 2 :] = lower[:, None, None, None]
    return ArraySplit(images, labels)


class Halves(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, [0, -1], 0]


class Lower(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, -1:, 0]


@pytest.fixture
def birds() -> Dataset:
    """95 % of the training images show the class in its own place; half of the test images do."""

    def draw(count: int, agreement: float, seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (count,), generator=random)
        agree = torch.rand(count, generator=random) < agreement
        return labels, torch.where(agree, labels, 1 - labels)

    drawn = {"train": draw(800, 0.95, 0), "test": draw(400, 0.5, 1), "val": draw(300, 0.5, 2)}
    splits = {name: split(*of, seed) for seed, (name, of) in enumerate(drawn.items())}
    places = Attribute("place", ["land", "water"], {name: places for name, (_, places) in drawn.items()})
    tests = {name: splits[name] for name in ("test", "val")}
    return Dataset("birds", ["landbird", "waterbird"], SIZE, splits["train"], tests, attribute=places)


def test_against_pandas(make: Make, birds: Dataset) -> None:
    evaluation = make(knn=["dino"])
    results = evaluation(Halves(), birds, device="cpu", seed=0, untrained_encoder=Lower())
    json.dumps(results.records.to_json(), allow_nan=False)
    assert {record.name for record in results.records.findings() if record.kind in ("accuracy", "groups")} == set(
        evaluation.names(birds)
    )
    assert birds.attribute
    shares = pd.DataFrame({"y": birds.train.labels, "a": birds.attribute.of["train"]}).value_counts(normalize=True)
    for encoder in ("trained", "untrained"):
        for classifier in ("linear", "knn-dino"):
            for fitted_on in ("train", BALANCED):
                table = pd.DataFrame(
                    {
                        "y": birds.tests["test"].labels,
                        "a": birds.attribute.of["test"],
                        "right": results.predictions[f"{encoder}/{classifier}/{fitted_on}/test"]
                        == birds.tests["test"].labels.numpy(),
                    }
                )
                by_group = table.groupby(["y", "a"]).right.agg(["mean", "size"])
                known = {"encoder": encoder, "classifier": classifier, "fitted_on": fitted_on}
                found = {r.metric: r for r in results.records.where("groups", **known)}
                expected = (by_group["mean"].min(), table.right.mean(), (by_group["mean"] * shares).sum())
                assert [found[metric].value for metric in METRICS] == pytest.approx(expected, abs=1e-6)
                for record in found.values():
                    assert record.low <= record.value + 1e-6  # type: ignore[operator]
                    assert record.high >= record.value  # type: ignore[operator]
                groups = results.records.where("group", **known)
                assert [r.value for r in groups] == pytest.approx(by_group["mean"].tolist())
                assert [r.n for r in groups] == by_group["size"].tolist()
                y, a = by_group["mean"].idxmin()
                worst = f"{birds.classes[y]}, {birds.attribute.values[a]} ({by_group['size'][y, a]} images)"
                assert found["worst"].note == worst


def test_the_balanced_probe_against_scikit_learn(make: Make, birds: Dataset) -> None:
    """Deep feature reweighting: the class is in the features, and an ordinary probe follows the place instead."""
    results = make()(Halves(), birds, device="cpu", seed=0)
    worst = {r.fitted_on: r.value for r in results.records.where("groups", metric="worst")}
    assert worst["train"] < 0.75  # type: ignore[operator]
    assert worst[BALANCED] > 0.8  # type: ignore[operator]
    features = {
        name: Halves()(part.images.float() / 100) for name, part in (("train", birds.train), *birds.tests.items())
    }
    groups = birds.groups("train")
    assert groups is not None
    weights = []
    for subset in range(3):
        index = balanced_groups(groups, 0, subset)
        fitted = LogisticRegression(C=1e3).fit(features["train"][index], birds.train.labels[index])
        weights.append([*fitted.coef_[0], *fitted.intercept_])
    upper, lower, bias = torch.tensor(weights).float().mean(0)
    taken = (features["test"] @ torch.stack([upper, lower]) + bias > 0).long()
    ours = torch.from_numpy(results.predictions[f"trained/linear/{BALANCED}/test"])
    assert (ours == taken).float().mean() > 0.97


def test_balanced_groups() -> None:
    groups = torch.tensor([0] * 50 + [2] * 7 + [3] * 20 + [-1] * 9)[torch.randperm(86)]
    first, second = (balanced_groups(groups, 0, subset) for subset in (0, 1))
    for index in (first, second):
        assert groups[index].bincount().tolist() == [7, 0, 7, 7]
        assert index.equal(index.unique())
    assert not first.equal(second)


def test_the_minimum_of_resampled_groups() -> None:
    """A wide interval of a small group is that of the minimum; a certain group has none."""
    small, certain = torch.tensor([True] * 5 + [False] * 5), torch.ones(500, dtype=torch.bool)
    bootstrap = Bootstrap(2000, 0)
    worst = bootstrap.of_parts([certain, small], lambda means: means.amin(0))
    assert (worst.value, worst.low, worst.high) == pytest.approx((0.5, 0.2, 0.8), abs=0.11)
    assert bootstrap.of_parts([certain], lambda means: means.amin(0)) == (1, 1, 1)
    apart = bootstrap.of_parts([small, small], lambda means: means[0] - means[1])
    assert apart.high > 0.3  # each set is resampled by itself


def test_a_group_of_few_images_is_not_the_worst(make: Make, birds: Dataset) -> None:
    """The encoder sees the place alone, and a land bird on the water is wrong. There are five of them."""
    groups = birds.groups("test")
    assert groups is not None
    test = birds.tests["test"]
    test.labels[groups == 2] = 0  # every bird on land is a land bird
    test.labels[(groups == 1).nonzero()[5:, 0]] = 1
    for fewest, worst in ((5, 0), (6, 1)):
        results = make(fewest=fewest)(Lower(), birds, device="cpu", seed=0)
        found = {r.metric: r for r in results.records.where("groups", fitted_on="train")}
        assert found["worst"].value == worst
        assert found["average"].value == pytest.approx(1 - 5 / 400)
        assert (found["worst"].note == "landbird, water (5 images)") == (fewest == 5)
        assert found["average"].note == ("" if fewest == 5 else "1 with fewer than 6 images do not count")
        assert len(results.records.where("group", fitted_on="train")) == 3
    with pytest.raises(UserError, match=r"test of birds has no groups of 1000 images or more, and two are needed"):
        make(fewest=1000).names(birds)


def test_on_the_validation_split(make: Make, birds: Dataset) -> None:
    results = make(balanced_from="val")(Halves(), birds, device="cpu", seed=0)
    assert {r.split for r in results.records.where("groups")} == {"test"}
    assert results.records.find("groups", metric="worst", fitted_on=BALANCED).value > 0.8  # type: ignore[union-attr, operator]


def test_the_embedded_set_knows_its_groups() -> None:
    data = confounded(
        seed=0, image_size=16, classes=3, train=900, balanced=90, test=90, rho=0.9, train_on="full", cache=None
    )
    assert data.group_names[:2] == ["disc, own background", "disc, other background"]
    train, balanced, test = (data.groups(name) for name in ("train", "balanced", "mixed_rand"))
    assert train is not None
    assert balanced is not None
    assert test is not None
    assert train.bincount().float().view(3, 2)[:, 0] / 300 == pytest.approx(torch.full((3,), 0.9), abs=0.06)
    assert balanced.bincount().float().view(3, 2)[:, 0] / 30 == pytest.approx(torch.full((3,), 1 / 3), abs=0.2)
    assert (test // 2).equal(data.tests["mixed_rand"].labels)
    assert data.groups("mixed_same").max() % 2 == 0  # type: ignore[union-attr]
    assert data.groups("only_fg") is None
    assert data.groups("fg") is None


def test_mistakes(make: Make, birds: Dataset, dataset: Dataset) -> None:
    with pytest.raises(UserError, match="flat does not say which group an image belongs to; choose dataset=confounded"):
        make().names(dataset)
    with pytest.raises(UserError, match="balanced_from=test is not possible; choose one of train, val"):
        make(balanced_from="test").names(birds)
    with pytest.raises(UserError, match="did you mean test"):
        make(split="tset").names(birds)
