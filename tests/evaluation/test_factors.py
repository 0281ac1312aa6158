"""Accuracy by factor against pandas, on annotations in the form of ImageNet-X."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.evaluation.factors import PUBLISHED, Factors, annotated

Make = Callable[..., Factors]
NAMES = ["multiple_objects", "background", "color", "brighter", "darker", "style"]


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


@pytest.fixture
def photos() -> Dataset:
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, 2, 90))
    levels = 100 + 20 * labels + torch.from_numpy(random.normal(0, 12, 90).round()).long()
    images = levels[:, None, None, None].expand(-1, 3, 8, 8).byte()
    split = ArraySplit(images, labels, files=[f"val/x/ILSVRC2012_val_{i:08}.JPEG" for i in range(90)])
    return Dataset("photos", ["0", "1"], 8, split, {"test": split})


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    """Annotations of two thirds of the images, and of others."""
    random = np.random.default_rng(1)
    rows = []
    for i in [*range(0, 90, 3), *range(1, 90, 3), 500, 501]:
        factors = {name: int(random.random() < (0.6 if name == "background" else 0.2)) for name in NAMES}
        factors["style"] = int(i > 400)
        words = {"justification": "a photo, \u00e9", "one_word": "white\n"}
        rows.append({"file_name": f"ILSVRC2012_val_{i:08}.JPEG", "class": i % 2, **factors, **words})
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pd.DataFrame(rows)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(**keys: Any) -> Factors:
        standard: dict[str, Any] = {
            "knn": ["dino"],
            "linear": True,
            "probe": "ours",
            "learning_rates": [1e-1],
            "probe_epochs": 10,
            "probe_batch_size": 64,
            "probe_held_out": 0.2,
            "bootstrap": 300,
            "untrained": True,
            "batch_size": 64,
            "annotations": str(tmp_path / "some.jsonl"),
            "split": None,
        }
        return Factors(**(standard | keys))

    return build


def test_against_pandas(make: Make, photos: Dataset, table: pd.DataFrame) -> None:
    evaluation = make()
    results = evaluation(Mean(), photos, device="cpu", seed=0)
    json.dumps(results.records.to_json(), allow_nan=False)
    found = [r for r in results.records.findings() if r.kind in ("accuracy", "factors") and r.metric == "accuracy"]
    assert {record.name for record in found} == set(evaluation.names(photos))
    for classifier in ("linear", "knn-dino"):
        right = results.predictions[f"trained/{classifier}/train/test"] == photos.train.labels.numpy()
        mine = table[table.file_name.str[-9:-5].astype(int) < 90].copy()
        mine["right"] = right[mine.file_name.str[-9:-5].astype(int)]
        records = results.records.where("factors", classifier=classifier)
        assert {record.told("factor") for record in records} == set(NAMES) - {"style"}  # no image here has it
        for record in records:
            those = mine[mine[record.told("factor")] == 1]
            assert record.n == len(those)
            expected = those.right.mean()
            if record.metric == "error_ratio":
                expected = (1 - expected) / (1 - mine.right.mean())
            assert record.value == pytest.approx(expected)
            assert record.low <= record.value + 1e-6 <= record.high + 2e-6  # type: ignore[operator]
    assert records[0].told("factor") == "background"  # the most frequent one


def test_the_package(make: Make, photos: Dataset, table: pd.DataFrame, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match="type pip install imagenet-x, or set"):
        make(annotations=None).names(photos)
    folder = tmp_path / "imagenet_x" / "annotations"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    (tmp_path / "some.jsonl").rename(folder / PUBLISHED)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any(name.endswith("/background") for name in make(annotations=None).names(photos))


def test_mistakes(make: Make, photos: Dataset, table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*none.jsonl; set evaluation.annotations"):
        make(annotations=str(tmp_path / "none.jsonl")).names(photos)
    (tmp_path / "bad.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError, match=r"bad.jsonl is damaged .*; set evaluation.annotations to lines of JSON"):
        make(annotations=str(tmp_path / "bad.jsonl")).names(photos)
    photos.tests["test"].files = None  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match="has no factors of images of this test split; it lists names such as ILSVRC2012_val"
    ):
        annotated(tmp_path / "some.jsonl", photos.tests["test"])
