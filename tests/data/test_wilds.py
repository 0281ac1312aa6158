"""Waterbirds and CelebA in the layouts of WILDS, on miniatures."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny import composed

from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.data.dataset import Dataset


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def opened(root: Path, *words: str) -> Dataset:
    words = ("dataset=wilds", f"dataset.root={root}", "dataset.image_size=32", *words)
    found: Dataset = build(check(composed(*words)).dataset)
    return found


@pytest.fixture
def waterbirds(tmp_path: Path) -> Path:
    """Twelve birds of three species; y, place and split in an order that gives each split both classes."""
    rows = []
    for i in range(12):
        name = f"{i % 3 + 1:03}.Species_{i % 3}/Bird_{i:04}.jpg"
        picture(tmp_path / name, i)
        place = {"place": i // 2 % 2, "place_filename": f"/b/bamboo_forest/{i:08}.jpg"}
        rows.append({"img_id": i + 1, "img_filename": name, "y": i % 2, "split": i // 4, **place})
    table(tmp_path / "metadata.csv", rows)
    return tmp_path


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    attributes, partitions = [], []
    for i in range(12):
        name = f"{i + 1:06}.jpg"
        picture(tmp_path / "img_align_celeba" / name, i)
        attributes.append({"image_id": name, "Bald": -1, "Blond_Hair": 2 * (i % 2) - 1, "Male": 2 * (i // 2 % 2) - 1})
        partitions.append({"image_id": name, "partition": i // 4})
    table(tmp_path / "list_attr_celeba.csv", attributes)
    table(tmp_path / "list_eval_partition.csv", partitions)
    return tmp_path


def test_waterbirds(waterbirds: Path) -> None:
    data = opened(waterbirds)
    assert list(data.classes) == ["landbird", "waterbird"]
    assert data.group_names == ["landbird, land", "landbird, water", "waterbird, land", "waterbird, water"]
    assert list(data.tests) == ["test", "val"]
    assert [Path(file).stem[-2:] for file in data.tests["val"].files] == ["04", "05", "06", "07"]  # type: ignore[attr-defined]
    for name in ("train", "test", "val"):
        split = data.train if name == "train" else data.tests[name]
        assert split.labels.tolist() == [0, 1, 0, 1]
        groups = data.groups(name)
        assert groups is not None
        assert groups.tolist() == [0, 2, 1, 3]


def test_celeba(celeba: Path) -> None:
    data = opened(celeba)
    assert list(data.classes) == ["not blond", "blond"]
    assert data.group_names == ["not blond, female", "not blond, male", "blond, female", "blond, male"]
    assert data.groups("test").tolist() == [0, 2, 1, 3]  # type: ignore[union-attr]
    bald = opened(celeba, "dataset.label=Male", "dataset.attribute=Blond_Hair")
    assert list(bald.classes) == ["female", "male"]
    assert bald.groups("test").tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    rows = []
    for i, name in enumerate(("cow", "camel", "cow", "camel")):
        picture(tmp_path / f"{i}.png", i)
        rows.append(
            {"img_filename": f"{i}.png", "animal": name, "groups": f"g{10 - i}", "split": ["train", "test"][i // 2]}
        )
    table(tmp_path / "metadata.csv", rows)
    data = opened(tmp_path, "dataset.label=animal", "dataset.attribute=groups")
    assert list(data.classes) == ["camel", "cow"]
    assert data.train.labels.tolist() == [1, 0]
    assert data.attribute
    assert list(data.attribute.values) == ["g10", "g7", "g8", "g9"]
    assert data.attribute.of["test"].tolist() == [2, 1]


def test_mistakes(waterbirds: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metadata.csv or list_attr_celeba.csv; set dataset.root"):
        opened(tmp_path / "001.Species_0")
    with pytest.raises(UserError, match=r"has no column plaice; did you mean place"):
        opened(waterbirds, "dataset.attribute=plaice")
    text = (waterbirds / "metadata.csv").read_text()
    (waterbirds / "metadata.csv").write_text(text.replace("Bird_0003.jpg,1,0", "Bird_0003.jpg,1,5"))
    with pytest.raises(UserError, match=r"has the split 5 for 001.Species_0/Bird_0003.jpg; write 0, 1 or 2"):
        opened(waterbirds)
    (waterbirds / "metadata.csv").write_text(text.replace("Bird_0003.jpg,1,0", "Bird_0003.jpg,,0"))
    with pytest.raises(UserError, match=r"Line 5 of .*metadata.csv has no y; correct it"):
        opened(waterbirds)
    (waterbirds / "metadata.csv").write_text(text.replace("001.Species_0/Bird_0003", "../Bird_0003"))
    with pytest.raises(UserError, match="leads out of"):
        opened(waterbirds)


def test_a_partition_of_other_images_is_refused(celeba: Path) -> None:
    lines = (celeba / "list_eval_partition.csv").read_text().splitlines()
    (celeba / "list_eval_partition.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    with pytest.raises(UserError, match="does not list the images of"):
        opened(celeba)
