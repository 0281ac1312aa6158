"""CKA and shared neighbours of two encoders, against brute force and where the answer is known."""

import copy
from pathlib import Path

import pytest
import torch

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluation.similarity import Similarity, shared_neighbours
from icl_msr.models.backbones import tiny
from icl_msr.models.exported import export_encoder

KEYS = {"split": None, "neighbours": 5, "batch_size": 32, "untrained": True}


def test_shared_neighbours_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(30, 4, generator=generator), torch.randn(30, 3, generator=generator)
    expected = 0.0
    for i in range(30):
        near = []
        for features in (first, second):
            cosine = torch.cosine_similarity(features[i][None], features)
            cosine[i] = -2
            near.append(set(cosine.topk(5).indices.tolist()))
        expected += len(near[0] & near[1]) / 5 / 30
    assert 0 < expected < 1
    assert shared_neighbours(first, second, 5) == pytest.approx(expected)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    assert shared_neighbours(first, 2 * first @ rotation, 5) == 1


def test_images_that_are_there_twice_are_no_neighbours_of_themselves() -> None:
    features = torch.eye(4).repeat_interleave(2, 0)
    assert shared_neighbours(features, features, 1) == 1
    assert shared_neighbours(features, features.roll(1, 0), 1) == 0


@pytest.fixture
def other(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    about = {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "other").mkdir()
    export_encoder(tiny(32, weights=None), tmp_path / "other", about)
    return tmp_path / "other" / "encoder.safetensors"


@pytest.fixture
def images() -> Dataset:
    pixels = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = ArraySplit(pixels, torch.arange(40) % 2)
    return Dataset("toy", ["a", "b"], 32, split, {"test": split}, mean=(0.4,) * 3, std=(0.2,) * 3)


def test_an_encoder_is_like_itself_and_fed_as_it_was_trained(other: Path, images: Dataset) -> None:
    torch.manual_seed(0)
    same, similarity = tiny(32, weights=None), Similarity(other=str(other), **KEYS)  # type: ignore[arg-type]
    fed = copy.copy(images)
    fed.mean, fed.std = (0.5,) * 3, (0.25,) * 3
    torch.manual_seed(1)
    stranger = tiny(32, weights=None)
    records = similarity(same, fed, device="cpu", seed=0, untrained_encoder=stranger).records.where("similarity")
    found = {(record.encoder, record.metric): record.value for record in records}
    assert list(dict.fromkeys(encoder for encoder, _ in found)) == ["trained", "untrained"]
    assert {record.told("other") for record in records} == {"other"}
    assert found["trained", "cka"] == pytest.approx(1, abs=1e-6)
    assert found["trained", "shared_neighbours"] == 1
    assert found["untrained", "cka"] < 0.999  # type: ignore[operator]
    assert found["untrained", "shared_neighbours"] < 1  # type: ignore[operator]
    assert found["trained", "chance"] == pytest.approx(5 / 39)


def test_mistakes(other: Path, images: Dataset) -> None:
    for keys, words in (({"split": "nothing"}, "no test split nothing"), ({"neighbours": 39}, "too few")):
        with pytest.raises(UserError, match=words):
            Similarity(other=str(other), **{**KEYS, **keys}).names(images)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="There is no encoder"):
        Similarity(other="nowhere", **KEYS)  # type: ignore[arg-type]
