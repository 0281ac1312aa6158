"""Some of the labels: balanced, seeded, written down and read again."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.files import FileSplit
from icl_msr.evaluation.labels import Part, balanced_part, listed_part, names, percent, require_labels


def data(labels: Tensor, files: list[str] | None = None, classes: int = 4) -> Dataset:
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    train = ArraySplit(images, labels, files=files)
    return Dataset("few", [str(k) for k in range(classes)], 2, train, {"test": ArraySplit(images, labels.clamp(min=0))})


def per_class(part: Part, labels: Tensor, classes: int = 4) -> list[int]:
    return labels[part.index].bincount(minlength=classes).tolist()


@pytest.fixture
def labels() -> Tensor:
    """400 images, 100 of each of 4 classes, in random order."""
    return (torch.arange(400) % 4)[torch.randperm(400, generator=torch.Generator().manual_seed(0))]


def test_parts_are_balanced_seeded_and_inside_one_another(labels: Tensor) -> None:
    dataset = data(labels)
    small, large = (balanced_part(dataset, fraction, seed=3) for fraction in (0.05, 0.5))
    assert per_class(small, labels) == [5] * 4
    assert per_class(large, labels) == [50] * 4
    assert set(small.index.tolist()) < set(large.index.tolist())
    for part in (small, large):
        assert part.note == ""
        assert part.index.tolist() == sorted(set(part.index.tolist()))
    assert torch.equal(small.index, balanced_part(dataset, 0.05, seed=3).index)
    assert not torch.equal(small.index, balanced_part(dataset, 0.05, seed=4).index)
    assert small.file == "labelled-5%.txt"
    records = small.records(labels)
    found = {"images": 20, "classes": 4, "fewest": 5, "most": 5}
    assert {record.metric: record.value for record in records} == found
    for record in records:
        assert record.factors == {"part": "5%", "chosen_by": "seed 3", "file": "labelled-5%.txt"}
        assert record.note == ""


def test_every_image_is_as_likely_as_another(labels: Tensor) -> None:
    dataset = data(labels)
    drawn = torch.zeros(400)
    for seed in range(400):
        drawn[balanced_part(dataset, 0.1, seed).index] += 1
    assert drawn.sum() == 400 * 40
    # Binomial, 400 draws at 0.1: mean 40, standard deviation 6.
    assert 40 - 30 < drawn.min() < drawn.max() < 40 + 30
    assert drawn.std() == pytest.approx(6, abs=1)


def test_all_labels_and_images_without_one(labels: Tensor) -> None:
    labels[::3] = -1
    everything = balanced_part(data(labels), 1, seed=0)
    assert torch.equal(everything.index, (labels >= 0).nonzero()[:, 0])
    assert everything.file == ""
    assert everything.records(labels) == []
    some = balanced_part(data(labels), 0.1, seed=0)
    assert (labels[some.index] >= 0).all()
    assert per_class(some, labels) == [round(0.1 * int((labels >= 0).sum()) / 4)] * 4


def test_too_few_for_a_class_are_still_one_and_it_is_said(labels: Tensor) -> None:
    part = balanced_part(data(labels), 0.001, seed=0)
    assert per_class(part, labels) == [1] * 4
    assert part.note == "0.1% of 400 labels is less than one for each of 4 classes, so one image of each is used, 1%"
    rare = torch.cat([labels, torch.tensor([4, 4])])
    part = balanced_part(data(rare, classes=6), 0.1, seed=0)
    assert per_class(part, rare, 6) == [8] * 4 + [2, 0]
    assert part.note == "1 of 6 classes have no label; classes with fewer than 8 images give all they have"


def test_without_labels(labels: Tensor) -> None:
    require_labels(data(labels))
    with pytest.raises(UserError, match="few has no training images with a label"):
        require_labels(data(torch.full((9,), -1)))
    with pytest.raises(UserError, match="few has 1 training image with a label"):
        require_labels(data(torch.tensor([-1, 2])))


def test_percent() -> None:
    assert [percent(part) for part in (0.01, 0.07, 0.1, 0.001, 1 / 3)] == ["1%", "7%", "10%", "0.1%", "33.3333%"]


FILES = {
    r"\d+": None,
    r"\d+.png": [f"/data/{i % 4}/{i}.png" for i in range(400)],
    r"\d/\d+.png": [f"/data/train/{i % 4}/{i // 4}.png" for i in range(400)],
    r"\w/\d/\d+.png": [f"/data/{'ab'[i % 2]}/{i // 2 % 2}/{i // 4}.png" for i in range(400)],
    r"\w/x/x/x/\d+.png": [f"/{'ab'[i % 2]}/x/x/x/{i // 2}.png" for i in range(400)],
}
"""Files by what tells them apart."""


@pytest.mark.parametrize("pattern", FILES)
def test_what_is_written_is_read_again(pattern: str, labels: Tensor, tmp_path: Path) -> None:
    dataset = data(labels, FILES[pattern])
    part = balanced_part(dataset, 0.05, seed=1)
    written = names(dataset.train, part.index)
    assert all(re.fullmatch(pattern, name) for name in written)
    file = tmp_path / "list.txt"
    file.write_text("\n".join(written) + "\n\n")
    again = listed_part(dataset, 0.05, file)
    assert torch.equal(again.index, part.index)
    assert (again.note, again.chosen_by) == ("", str(file))


def test_a_published_list_for_more_than_is_there(tmp_path: Path) -> None:
    files = ["/in100/train/n01/n01_5.JPEG", "/in100/train/n01/n01_7.JPEG", "/in100/train/n02/n02_5.JPEG"]
    files.append("/in100/train/n02/n02_9.JPEG")  # without a label
    split = FileSplit(files, torch.tensor([0, 0, 1, -1]), 32)
    test = FileSplit(files[:3], torch.tensor([0, 0, 1]), 32)
    dataset = Dataset("in100", ["n01", "n02", "n03"], 32, split, {"test": test})
    file = tmp_path / "1percent.txt"
    file.write_text("n01_7.JPEG\nn02_5.JPEG\nn77_1.JPEG\nn02_5.JPEG\nn02_9.JPEG\n")
    part = listed_part(dataset, 0.01, file)
    assert part.index.tolist() == [1, 2]
    covers, lacking = "the list covers 66.67% of the labels", "1 of 3 classes have no image in the list"
    said = f"2 of 4 names are not labelled training images here; {lacking}"
    assert listed_part(dataset, 0.6, file).note == said
    assert covers in part.note  # another list than was meant


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory); evaluation.files names lists of images."),
        (b"\xff\xfe\xfa", "cannot be read (it is not text); evaluation.files names lists of images."),
        (b"", "names no labelled training images of few, which has names like 0/0.png; give another list"),
        (b"1/0.png\n4/0.png", "names 1 labelled training image of few, which has names like 0/0.png"),
        (b"0.png", "names 0.png, and few has several such training images; write the names with their folders"),
    ],
)
def test_lists_that_do_not_fit(content: bytes | None, said: str, labels: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as mistake:
        listed_part(data(labels, FILES[r"\d/\d+.png"]), 0.1, file)
    assert str(mistake.value).startswith(f"{file} {said}")
    assert str(mistake.value).endswith(".")
