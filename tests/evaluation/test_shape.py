"""Shape bias of encoders that see the silhouette alone and the texture alone, on stimuli that the test draws."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset, normalise
from icl_msr.evaluation.cache import FeatureCache
from icl_msr.evaluation.shape import ShapeAndTexture, folds_by_instance, read_stimuli
from icl_msr.evaluation.sixteen import SIXTEEN
from icl_msr.evaluation.suite import Results

CLASSES, SIZE = ["bear", "cat", "clock", "dog"], 16
COLOURS = torch.tensor([[230, 40, 40], [40, 230, 40], [60, 60, 240], [220, 220, 60]])


def paint(shape: int, texture: int, wobble: int = 0) -> Tensor:
    """uint8 (3, S, S): a silhouette on black, filled with the texture's colour; `wobble` moves both a little."""
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    row, column = 4 + wobble % 2, 4 + wobble // 2 % 2
    height, width = [(8, 8), (3, 8), (8, 3), (3, 3)][shape]
    mask[row : row + height, column : column + width] = True
    return (COLOURS[texture] + wobble)[:, None, None].mul(mask).to(torch.uint8)


class Silhouette(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (images.amax(1) > -1.2).float().flatten(1)


class Texture(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        inside = (images.amax(1, keepdim=True) > -1.2).float()
        return (images * inside).sum((2, 3)) / inside.sum((2, 3))


class Both(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        mask = images.amax(1) > -1.2
        return torch.cat([mask.any(1).sum(1)[:, None], mask.any(2).sum(1)[:, None], Texture()(images)], 1)


class Nothing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.new_ones(len(images), 4) + 0 * images.mean((1, 2, 3))[:, None]


@pytest.fixture
def stimuli(tmp_path: Path) -> Path:
    """Each shape three times with each texture, one of three instances each; a quarter has no conflict."""
    for s, shape in enumerate(CLASSES):
        (tmp_path / "stimuli" / shape).mkdir(parents=True)
        for t, texture in enumerate(CLASSES):
            for i in range(3):
                image = Image.fromarray(paint(s, t, i).permute(1, 2, 0).numpy())
                image.save(tmp_path / "stimuli" / shape / f"{shape}{i + 1}-{texture}{(i + s) % 3 + 1}.jpg", quality=95)
    return tmp_path / "stimuli"


@pytest.fixture
def natural() -> Dataset:
    """Images whose shape and texture agree, as those of the world do."""
    labels = torch.arange(160) % 4
    images = torch.stack([paint(k, k, i % 11) for i, k in enumerate(labels.tolist())])
    return Dataset("natural", CLASSES, SIZE, ArraySplit(images, labels), {"test": ArraySplit(images, labels)})


@pytest.fixture
def make(stimuli: Path) -> Callable[..., ShapeAndTexture]:
    def build(**keys: Any) -> ShapeAndTexture:
        standard: dict[str, Any] = {
            "knn": ["icl"],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-2, 1e-1],
            "probe_epochs": 30,
            "probe_batch_size": 32,
            "probe_held_out": 0.2,
            "bootstrap": 100,
            "untrained": True,
            "batch_size": 16,
            "stimuli": str(stimuli),
            "same": {},
            "head": False,
            "folds": 5,
        }
        return ShapeAndTexture(**(standard | keys))

    return build


Make = Callable[..., ShapeAndTexture]


def shape_rows(results: Results) -> dict[str, dict[str, Any]]:
    """What was found of each classifier."""
    rows: dict[str, dict[str, Any]] = {}
    for record in results.records.where("shape"):
        row = rows.setdefault(str(record.classifier), {"n": record.n})
        row[record.metric] = record.value
        if record.metric == "classes":
            row["names"] = record.note
    return rows


@pytest.mark.parametrize(("encoder", "bias"), [(Silhouette(), 1.0), (Texture(), 0.0)])
def test_encoders_that_see_one_cue_alone(make: Make, natural: Dataset, encoder: nn.Module, bias: float) -> None:
    results = make()(encoder, natural, device="cpu", seed=0)
    json.dumps(results.records.to_json(), allow_nan=False)
    names = {record.name for record in results.records.where("accuracy")}
    assert names == set(make().names(natural))
    rows = shape_rows(results)
    for row, gap in zip(rows.values(), results.records.where("gap"), strict=True):
        assert gap.value == pytest.approx(100 * (row["shape"] - row["texture"]), abs=1e-4)
    assert list(rows) == ["knn-icl", "linear"]
    for row in rows.values():
        assert row["n"] == 36
        assert row["names"] == ", ".join(CLASSES)
        assert row["classes"] == len(CLASSES)
        assert row["decided"] >= 30
        assert row["shape_bias"] == pytest.approx(bias, abs=0.05)
        assert row["shape"] + row["texture"] == pytest.approx(row["decided"] / row["n"])
    read = results.records.where("decodability")
    assert list(dict.fromkeys(record.told("cue") for record in read)) == ["shape", "texture"]
    assert {record.n for record in read} == {36}
    seen, unseen = (
        {record.metric: record.value for record in read if record.told("cue") == cue}
        for cue in (("shape", "texture") if bias else ("texture", "shape"))
    )
    assert seen["accuracy"] > 0.9
    assert unseen["accuracy"] < 0.5
    assert seen["chance"] == 0.25
    assert seen["folds"] == 3  # instances of a class


def test_both_cues_can_be_read_from_features_that_hold_both(make: Make, natural: Dataset) -> None:
    results = make(knn=[])(Both(), natural, device="cpu", seed=0, untrained_encoder=Nothing())
    read = results.records.where("decodability", metric="accuracy")
    by = {(record.encoder, record.told("cue")): record.value for record in read}
    assert min(by["trained", "shape"], by["trained", "texture"]) > 0.9
    assert max(by["untrained", "shape"], by["untrained", "texture"]) < 0.5


def test_classes_that_the_data_does_not_cover(make: Make, natural: Dataset) -> None:
    """Two covered classes, one under other names: conflicts between these two alone."""
    natural.classes = ["kitten", "hound", "cat_and_such", "bear"]  # the data set's numbers stand for other classes now
    evaluation = make(same={"cat": ["kitten", "cat_and_such"]})
    assert "linear/train/conflict_shape" in evaluation.names(natural)
    results = evaluation(Silhouette(), natural, device="cpu", seed=0)
    for row in shape_rows(results).values():
        assert row["names"] == "bear, cat"
        assert row["n"] == 6  # bear on cat and cat on bear, three of each
    natural.classes = ["a", "b", "c", "d"]
    alone = make()(Silhouette(), natural, device="cpu", seed=0)
    assert alone.records.where("shape") == []
    assert make().names(natural) == ["linear/stimuli/shape", "linear/stimuli/texture"]
    assert len(alone.records.where("decodability", metric="accuracy")) == 2


def test_what_is_read_of_the_names(stimuli: Path) -> None:
    found = read_stimuli(stimuli)
    assert (len(found), found.without_conflict, found.classes) == (36, 12, CLASSES)
    at = found.files.index(str(stimuli / "cat" / "cat2-dog3.jpg"))
    assert [CLASSES[found.labels[cue][at]] for cue in ("shape", "texture")] == ["cat", "dog"]
    assert [found.instances[cue][at] for cue in ("shape", "texture")] == ["cat2", "dog3"]


def test_folds_keep_instances_together() -> None:
    instances = [f"{name}{i}" for name in "ab" for i in range(7) for _ in range(3)]
    labels = torch.tensor([name == "b" for name in "ab" for _ in range(21)]).long()
    fold, folds = folds_by_instance(instances, labels, 3)
    assert folds == 3
    for instance in set(instances):
        assert len({int(k) for k, name in zip(fold, instances, strict=True) if name == instance}) == 1
    for k in range(3):
        assert set(labels[fold == k].tolist()) == {0, 1}


class Head(nn.Module):
    """Scores of ImageNet's classes by how near an image is to the colour, or to the silhouette, of each class."""

    def __init__(self, see: nn.Module, natural: Dataset) -> None:
        super().__init__()
        self.see = see
        first = normalise(natural.train.load(torch.arange(4)), natural.mean, natural.std)
        self.register_buffer("known", see(first))

    def forward(self, images: Tensor) -> Tensor:
        scores = images.new_full((len(images), 1000), -100.0)
        for k, name in enumerate(CLASSES):
            distance = (self.see(images) - self.known[k]).square().sum(1)
            scores[:, SIXTEEN[name][-1]] = -distance
        return scores


@pytest.mark.parametrize(("encoder", "bias"), [(Silhouette(), 1.0), (Texture(), 0.0)])
def test_a_classifier_that_sees_one_cue_alone(
    make: Make, natural: Dataset, monkeypatch: pytest.MonkeyPatch, encoder: nn.Module, bias: float
) -> None:
    """Beside the fitted ones, whatever the data set's classes are; the untrained encoder has none."""
    natural.classes = ["a", "b", "c", "d"]
    monkeypatch.setattr("icl_msr.evaluation.shape.with_classifier", lambda _: Head(encoder, natural))
    evaluation = make(head=True)
    evaluation.require(Nothing())
    results = evaluation(Nothing(), natural, device="cpu", seed=0, untrained_encoder=Nothing())
    names = {record.name for record in results.records.where("accuracy")}
    assert names == set(evaluation.names(natural))
    rows = results.records.where("shape")
    assert {(row.encoder, str(row.classifier), row.fitted_on) for row in rows} == {("trained", "head", "own")}
    row = shape_rows(results)["head"]
    assert row["names"] == ", ".join(SIXTEEN)
    assert row["n"] == 36
    assert row["decided"] >= 30
    assert row["shape_bias"] == pytest.approx(bias, abs=0.05)
    assert [str(gap.classifier) for gap in results.records.where("gap")] == ["head"]


def test_classes_that_are_none_of_the_sixteen(make: Make, natural: Dataset, tmp_path: Path) -> None:
    for name in ("lion1-tiger1", "cat1-tiger1"):
        (tmp_path / "others" / name.partition("1")[0]).mkdir(parents=True)
        (tmp_path / "others" / name.partition("1")[0] / f"{name}.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"decides among airplane, .*, truck, and no image of .*others has shape and texture among them"
    ):
        make(head=True, stimuli=str(tmp_path / "others")).require(Nothing())
    with pytest.raises(UserError, match="needs an encoder with a classifier of its own"):
        make(head=True).require(Nothing())
    make().require(Nothing())


def test_mistakes(make: Make, natural: Dataset, stimuli: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        make(stimuli=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"evaluation.same.lion is not a class of the stimuli \(bear, cat"):
        make(same={"lion": ["cat"]})
    with pytest.raises(UserError, match=r"evaluation.same.cat names tiger, which is not a class of the data set"):
        make(same={"cat": ["tiger"]}).names(natural)
    (stimuli / "cat" / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"photo.jpg is not named as a cue-conflict image"):
        make()


def test_batch_size_and_cache_do_not_matter(make: Make, natural: Dataset, tmp_path: Path) -> None:
    one = make()(Both(), natural, device="cpu", seed=0).records
    assert make(batch_size=7)(Both(), natural, device="cpu", seed=0).records == one
    cache = FeatureCache(tmp_path / "cache")
    assert make()(Both(), natural, device="cpu", seed=0, extractor=cache).records == one
