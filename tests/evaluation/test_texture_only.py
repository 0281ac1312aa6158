"""Non-semantic versions of test images: what an encoder that sees colours alone, or shapes alone, tells from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from icl_msr.core.config import build, check_node, config_dir
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluation.cache import FeatureCache, split_identity
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.suite import Results
from icl_msr.evaluation.texture_only import TextureImages, non_semantic, read_superclasses, told_apart
from icl_msr.negatives import PatchNegatives, TextureNegatives

CLASSES, SIZE = ["red bar", "red dot", "blue bar", "blue dot"], 32
Make = Callable[..., TextureImages]


def paint(k: int, i: int) -> Tensor:
    """uint8 (3, S, S): a colour all over, and in it a light bar or dot, somewhere."""
    image = torch.full((3, SIZE, SIZE), 40)
    image[0 if k < 2 else 2] = 170 + i % 7
    row, column = 4 + i % 5, 3 + i // 5 % 5
    height, width = (3, 20) if k % 2 == 0 else (8, 8)
    image[:, row : row + height, column : column + width] = 230
    return image.to(torch.uint8)


class Colour(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Shape(nn.Module):
    """Pictures are as wide as what is light in them."""

    def forward(self, images: Tensor) -> Tensor:
        light = (images.amin(1) > 0.8).float()
        return torch.stack([light.amax(1).sum(1), light.amax(2).sum(1)], 1)


@pytest.fixture
def dataset() -> Dataset:
    labels = torch.arange(160) % 4
    images = torch.stack([paint(k, i // 4) for i, k in enumerate(labels.tolist())])
    split = ArraySplit(images, labels)
    return Dataset("painted", CLASSES, SIZE, split, {"all": split, "few": ArraySplit(images[:9], labels[:9])})


def node(name: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(config_dir() / "negatives" / f"{name}.yaml"))


def values(**changes: Any) -> dict[str, Any]:
    return {
        "knn": ["icl"],
        "linear": True,
        "probe": "ours",
        "learning_rates": [1e-2, 1e-1],
        "probe_epochs": 30,
        "probe_batch_size": 32,
        "probe_held_out": 0.2,
        "bootstrap": 100,
        "untrained": True,
        "batch_size": 64,
        "generators": {name: node(name) for name in ("patch", "phase", "texture")},
        "split": None,
        "superclasses": None,
        "_target_": "icl_msr.evaluation.texture_only.TextureImages",
    } | changes


@pytest.fixture
def make() -> Make:
    def made(**changes: Any) -> TextureImages:
        """As a run does it: checked, then built with what is in it."""
        check_node("evaluation", values(**changes))
        evaluation: TextureImages = build(values(**changes))
        return evaluation

    return made


def rows(results: Results, level: str, classifier: str = "linear") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in results.records.where("texture", level=level, classifier=classifier, encoder="trained"):
        found.setdefault(record.told("images"), {})[record.metric] = record.value
    for row in results.records.by_class:
        if (str(row.classifier), row.encoder, row.classes is None) == (classifier, "trained", level == "fine"):
            found[row.split]["by_class"] = dict(zip(row.classes or CLASSES, row.accuracies, strict=True))
    return found


def test_colours_are_told_from_what_is_left_and_shapes_are_not(make: Make, dataset: Dataset) -> None:
    """Of an encoder that sees both, a class is told as far as its colour goes: the superclass, and half of the rest."""
    dataset.superclasses = ["red", "red", "blue", "blue"]

    class Both(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([10 * Colour()(images), Shape()(images)], 1)

    evaluation = make()
    results = evaluation(Both(), dataset, device="cpu", seed=0, untrained_encoder=Shape())
    json.dumps(results.records.to_json(), allow_nan=False)
    fine, coarse = rows(results, "fine"), rows(results, "coarse")
    assert list(fine) == list(coarse) == ["all", "only_patch", "only_phase", "only_texture"]
    assert fine["all"]["accuracy"] > 0.95
    for name in list(fine)[1:]:
        assert coarse[name]["accuracy"] > 0.95
        assert fine[name]["accuracy"] < 0.75
        assert list(fine[name]["by_class"]) == CLASSES
        assert list(coarse[name]["by_class"]) == ["red", "blue"]
        assert fine[name]["accuracy"] == pytest.approx(np.mean(list(fine[name]["by_class"].values())))
    assert {row["chance"] for row in fine.values()} == {0.25}
    assert {row["chance"] for row in coarse.values()} == {0.5}
    names = {record.name for record in results.records.where("accuracy")}
    assert names == set(evaluation.names(dataset))
    for record in results.records.where("accuracy"):
        predicted = results.predictions[f"{record.encoder}/{record.classifier}/train/{record.split}"]
        labels = results.predictions[f"labels/{record.split}"]
        assert record.value == pytest.approx(np.mean(predicted == labels))
    known = {"split": "only_patch", "minus": "chance", "classifier": "linear", "encoder": "trained"}
    (gap,) = results.records.where("gap", **known)
    assert gap.value == pytest.approx(100 * (fine["only_patch"]["accuracy"] - 0.25), abs=1e-4)
    assert gap.low <= gap.value <= gap.high  # type: ignore[operator]


def test_images_are_those_of_the_generator(dataset: Dataset) -> None:
    keys_of = {name: value for name, value in node("patch").items() if name != "_target_"}
    patch = PatchNegatives(**keys_of)
    split = dataset.tests["few"]
    versions = non_semantic(split, patch, 3, torch.device("cpu"))
    assert len(versions) == 9
    assert torch.equal(versions.labels, split.labels)
    images, index = split.load(torch.arange(9)), torch.arange(9)
    expected = patch(images, keys(3, 0, index, -200))[:, 0]
    assert versions.load(index).dtype == torch.uint8
    assert torch.equal(versions.load(index), expected)
    assert torch.equal(versions.load(torch.tensor([7, 2])), expected[[7, 2]])
    texture = TextureNegatives(**{name: value for name, value in node("texture").items() if name != "_target_"})
    identities = {
        split_identity(non_semantic(part, generator, seed, torch.device("cpu")))
        for part in dataset.tests.values()
        for generator in (patch, PatchNegatives(**{**keys_of, "largest": 32}), texture)
        for seed in (0, 1)
    }
    assert len(identities) == 12


def test_a_noise_that_leaves_the_range_is_cut(dataset: Dataset) -> None:
    def louder(query: Tensor, keys: Tensor) -> Tensor:
        return (3 * query - 300.4)[:, None]

    versions = non_semantic(dataset.tests["few"], louder, 0, torch.device("cpu"))
    expected = (3 * dataset.tests["few"].load(torch.arange(9)).double() - 300.4).round().clamp(0, 255)
    assert torch.equal(versions.load(torch.arange(9)).double(), expected)


def test_classes_of_one_name_count_as_one() -> None:
    predicted, labels = torch.tensor([0, 1, 2, 2, 1, 3]), torch.tensor([0, 0, 0, 2, 1, 1])
    fine = told_apart(predicted, labels, ["a", "b", "c", "d"], Bootstrap(10, 0))
    assert fine.by_name == {"a": 1 / 3, "b": 1 / 2, "c": 1.0, "d": None}
    assert fine.accuracy.value == pytest.approx(3 / 6)
    coarse = told_apart(predicted, labels, ["x", "x", "y", "y"], Bootstrap(10, 0))
    assert coarse.by_name == {"x": 3 / 5, "y": 1.0}
    assert coarse.accuracy.value == pytest.approx(4 / 6)
    uneven = told_apart(predicted, labels, ["x", "x", "x", "y"], Bootstrap(10, 0))
    assert uneven.chance == pytest.approx(0.75)  # all images are of x, which has three of four classes


def test_batch_size_and_cache_do_not_matter(make: Make, dataset: Dataset, tmp_path: Path) -> None:
    one = make()(Colour(), dataset, device="cpu", seed=0).records
    assert make(batch_size=9)(Colour(), dataset, device="cpu", seed=0).records == one
    cache = FeatureCache(tmp_path / "cache")
    assert make()(Colour(), dataset, device="cpu", seed=0, extractor=cache).records == one
    assert make()(Colour(), dataset, device="cpu", seed=1).records != one


def test_superclasses_from_a_file(make: Make, dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "kinds.csv"
    file.write_text("class,superclass,note\n" + "".join(f"{name},{name.split()[1]},\n" for name in reversed(CLASSES)))
    assert read_superclasses(file, CLASSES) == ["bar", "dot", "bar", "dot"]
    dataset.superclasses = ["red", "red", "blue", "blue"]
    results = make(superclasses=str(file), split="few")(Colour(), dataset, device="cpu", seed=0)
    assert list(rows(results, "coarse")["only_patch"]["by_class"]) == ["bar", "dot"]
    assert {record.split for record in results.records.where("texture")} == {"few"}


def test_mistakes(make: Make, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.split=al is not a test split; did you mean all"):
        make(split="al").names(dataset)
    with pytest.raises(UserError, match=r"evaluation.generators.patch.smallest=0 is not allowed"):
        make(generators={"patch": {**node("patch"), "smallest": 0}})
    cached = {**node("cached"), "folder": "textures"}
    with pytest.raises(UserError, match=r"evaluation.generators.old is not a generator .* ~evaluation.generators.old"):
        make(generators={"old": cached})
    file = tmp_path / "kinds.csv"
    for content, said in (
        (None, "is not a file of superclasses; .* columns class and superclass"),
        ("a,b\nc,d\n", "is not a file of superclasses"),
        ("class,superclass\nred bar,red\nred dot,\n", r"no superclass for 3 classes, the first is red dot; add a line"),
    ):
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=said):
            make(superclasses=str(file)).names(dataset)
