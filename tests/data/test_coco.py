"""COCO's layout and annotation file, in small and with real files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.programs import Programs
from support.tiny import composed
from torch import Tensor

from icl_msr.core.config import check
from icl_msr.core.errors import UserError
from icl_msr.data.coco import coco, single_targets
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.files import FileSplit
from icl_msr.data.folders import imagefolder

CATEGORIES = {18: "dog", 1: "person", 17: "wine glass"}
"""In the order of the file, which is not that of the numbers."""
Object = dict[str, Any]


def seen(category: int, *bbox: float, **more: Any) -> Object:
    """An annotation as COCO has it, with more than is read."""
    outline = [[bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]]]
    return {"category_id": category, "bbox": list(bbox), "iscrowd": 0, "segmentation": outline, **more}


def write(root: Path, part: str, images: list[list[Object]], size: tuple[int, int] = (48, 32)) -> Path:
    """A part of COCO with these objects in its images, which are `size` wide and high; the annotation file."""
    rng = np.random.default_rng(len(part))
    folder = root / f"{part}2017"
    folder.mkdir(parents=True)
    content: dict[str, Any] = {"info": {"year": 2017}, "images": [], "annotations": []}
    content["categories"] = [{"id": k, "name": name, "supercategory": "x"} for k, name in CATEGORIES.items()]
    for i, objects in enumerate(images):
        name, number = f"{i:012}.png", 100 - i
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / name)
        content["images"].append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        content["annotations"] += [{"image_id": number, **found} for found in objects]
    content["annotations"].reverse()  # nobody promised an order
    path = root / f"annotations/instances_{part}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


BOX = (16.3, 8.0, 15.5, 15.99)  # pixels 16 to 31 across, 8 to 23 down
TRAIN = [
    [seen(18, *BOX)],
    [seen(1, *BOX), seen(18, 0, 0, 4, 4)],  # two
    [seen(1, *BOX)],
    [],  # none
    [seen(17, *BOX, iscrowd=1)],  # one annotation of many
    [seen(1, *BOX)],
    [seen(1, *BOX), seen(17, 0, 0, 4, 4, iscrowd=1)],  # one beside a crowd
    [seen(17, *BOX)],
    [seen(17, 3.5, 4.5, 0, 0)],  # one without a size
    [seen(17, *BOX)],
]
TEST = [[seen(17, *BOX)], [seen(18, *BOX)], [seen(1, *BOX)]]


def make(root: Path) -> Path:
    write(root, "train", TRAIN)
    write(root, "val", TEST)
    return root


def keys(*words: str) -> dict[str, Any]:
    """Those of the YAML file."""
    node = check(composed("dataset=coco", "dataset.root=coco", *words)).dataset
    return {name: value for name, value in node.items() if name not in ("_target_", "root")}


def read(root: Path, **changes: Any) -> Dataset:
    return coco(root=str(root), **{**keys(), "classes": 3, "image_size": 32, **changes})


def shown(data: Dataset, index: int) -> dict[str, Tensor]:
    return {key: split.load(torch.tensor([index]))[0] for key, split in data.tests.items()}


def files(split: Any) -> list[int]:
    return [int(Path(file).stem) for file in split.files]


def test_images_with_one_object_are_kept(tmp_path: Path) -> None:
    data = read(make(tmp_path))
    assert files(data.train) == [0, 2, 5, 7, 9]
    assert files(data.tests["full"]) == [0, 1, 2]
    assert data.train.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.tests["fg"].labels.tolist() == [2, 0, 1]
    assert data.train.labels.dtype == torch.int64
    assert (data.name, data.image_size, data.balanced) == (tmp_path.name, 32, None)


def test_selection_equals_that_of_a_slow_reader(tmp_path: Path) -> None:
    """On many random images: for each image, all annotations are gone through."""
    rng = np.random.default_rng(0)

    def random_object() -> Object:
        bbox = [*rng.uniform(-2, 9, 2).round(2).tolist(), *rng.uniform(0, 12, 2).round(2).tolist()]
        return seen(int(rng.choice(list(CATEGORIES))), *bbox, iscrowd=int(rng.random() < 0.3))

    images = [[random_object() for _ in range(rng.integers(0, 4))] for _ in range(100)]
    path = write(tmp_path, "train", images, size=(16, 8))
    content = json.loads(path.read_text())
    rows, columns = np.mgrid[:8, :16]
    for min_area in (1, 20):
        expected = []
        for image in content["images"]:
            here = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            if len(here) != 1 or here[0]["iscrowd"]:
                continue
            x, y, across, down = here[0]["bbox"]
            inside = (columns + 1 > x) & (columns < x + across) & (rows + 1 > y) & (rows < y + down)
            if inside.any() and across * down >= min_area:
                ys, xs = inside.nonzero()
                box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                expected.append((image["file_name"], CATEGORIES[here[0]["category_id"]], box))
        categories, targets = single_targets(path, "train", min_area)
        assert categories == list(CATEGORIES.values())
        assert [(t.file, t.name, t.box) for t in targets] == expected
        assert len(expected) > 5


def test_boxes_are_whole_pixels_inside_the_image(tmp_path: Path) -> None:
    boxes = [(16.3, 8, 15.5, 15.99), (-3, -2.5, 10, 10), (40.2, 30.9, 20, 20), (48, 0, 5, 5)]
    path = write(tmp_path, "train", [[seen(1, *box)] for box in boxes])
    found = [target.box for target in single_targets(path, "train", 1)[1]]
    assert found == [(16, 8, 32, 24), (0, 0, 7, 8), (40, 30, 48, 32)]


def test_small_objects_are_left_out_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path, "train", [[seen(1, 0, 0, 4, 5)], [seen(1, 0, 0, 4, 4.75)], [seen(1, 0, 0, 9, 9)]])
    assert [target.file for target in single_targets(path, "train", 20)[1]] == [f"{i:012}.png" for i in (0, 2)]


def test_classes_are_the_most_frequent_or_named(tmp_path: Path) -> None:
    """In train; the order of the labels is that of the file, or of the list."""
    root = make(tmp_path)
    data = read(root, classes=2)
    assert list(data.classes) == ["person", "wine glass"]
    assert (files(data.train), data.train.labels.tolist()) == ([2, 5, 7, 9], [0, 0, 1, 1])
    assert (files(data.tests["full"]), data.tests["full"].labels.tolist()) == ([0, 2], [1, 0])
    data = read(root, classes=["wine glass", "dog"])
    assert list(data.classes) == ["wine glass", "dog"]
    assert (files(data.train), data.train.labels.tolist()) == ([0, 7, 9], [1, 0, 0])
    assert list(read(root).classes) == ["dog", "person", "wine glass"]


def test_of_equally_frequent_classes_the_first_of_the_file_are_taken(tmp_path: Path) -> None:
    write(tmp_path, "train", [[seen(17, *BOX)], [seen(1, *BOX)], [seen(18, *BOX)]])
    write(tmp_path, "val", TEST)
    assert list(read(tmp_path, classes=2).classes) == ["dog", "person"]


def pixels(root: Path, part: str, index: int) -> Tensor:
    """Image `index` of a part as PIL reads it, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(root / f"{part}2017/{index:012}.png"))).permute(2, 0, 1)


@pytest.mark.parametrize("resident_size", [96, 0])
def test_crops_have_the_pixels_of_the_file(tmp_path: Path, resident_size: int) -> None:
    """The box is as large as the crop, so that nothing is resized."""
    data = read(make(tmp_path), image_size=16, train_on="fg", resident_size=resident_size)
    assert isinstance(data.train, FileSplit) == (resident_size == 0)
    for i, number in enumerate(files(data.train)):
        assert torch.equal(data.train.load(torch.tensor([i]))[0], pixels(tmp_path, "train", number)[:, 8:24, 16:32])
    for i in range(3):
        images, whole = shown(data, i), pixels(tmp_path, "val", i)
        assert torch.equal(images["fg"], whole[:, 8:24, 16:32])
        windows = whole.unfold(1, 16, 1).unfold(2, 16, 1)  # all places of such a crop
        assert (windows == images["crop"][:, None, None]).all(-1).all(-1).all(0).sum() == 1


@pytest.mark.parametrize("resident_size", [96, 0])
def test_object_and_background_have_the_pixels_of_the_file(tmp_path: Path, resident_size: int) -> None:
    """The image is as high as the square that is cut from it, so that nothing is resized."""
    data = read(make(tmp_path), resident_size=resident_size)
    assert list(data.tests) == ["full", "fg", "crop", "only_fg", "only_bg"]
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[8:24, 8:24] = True
    for i in range(3):
        images, square = shown(data, i), pixels(tmp_path, "val", i)[:, :, 8:40]
        assert torch.equal(images["full"], square)
        assert torch.equal(images["only_fg"], square * inside)
        assert torch.equal(images["only_bg"], square * ~inside)
    assert torch.equal(data.train.load(torch.tensor([1]))[0], pixels(tmp_path, "train", 2)[:, :, 8:40])


def test_boxes_equal_those_of_an_imagefolder(tmp_path: Path) -> None:
    """The same images as class folders with a table of boxes give the same splits."""
    data = read(make(tmp_path / "coco"), train_on="fg")
    lines = ["split,class,file,xmin,ymin,xmax,ymax"]
    for part, split in (("train", data.train), ("val", data.tests["full"])):
        for number, label in zip(files(split), split.labels.tolist(), strict=True):
            name = data.classes[label]
            target = tmp_path / f"folders/{part}/{name}/{number:012}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tmp_path / f"coco/{part}2017/{number:012}.png").read_bytes())
            lines.append(f"{part},{name},{target.name},16,8,31,23")
    (tmp_path / "folders/boxes.csv").write_text("\n".join(lines))
    node = check(composed("dataset=imagefolder", f"dataset.root={tmp_path}/folders", "dataset.boxes=boxes.csv")).dataset
    wanted = {name: value for name, value in node.items() if name != "_target_"}
    other = imagefolder(**{**wanted, "image_size": 32, "train_on": "fg"})
    assert list(other.classes) == list(data.classes)
    assert (other.mean, other.std) == (data.mean, data.std)
    for key in ("train", *set(data.tests) - {"crop"}):  # crops lie where the number of the image says
        ours, theirs = (set_.train if key == "train" else set_.tests[key] for set_ in (data, other))
        assert isinstance(ours, ArraySplit)
        assert isinstance(theirs, ArraySplit)
        order = np.argsort(ours.labels.numpy(), kind="stable")
        assert torch.equal(ours.images[order], theirs.images)


def test_the_papers_augmentation_is_the_default() -> None:
    settings = check(composed("dataset=coco", "dataset.root=coco"))
    assert settings.augment == check(composed("augment=imagenet")).augment
    other = check(composed("dataset=coco", "dataset.root=coco", "augment=small"))
    assert other.augment == check(composed("augment=small")).augment


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "gone"}, "There is no folder gone; set dataset.root"),
        ({"train": "gone"}, r"There is no image .*gone/000000000000\.png, .* set dataset\.train to"),
        ({"test": "gone"}, r"set dataset\.test to"),
        ({"train_annotations": "gone.json"}, r"There is no file .*gone\.json; set dataset\.train_annotations"),
        ({"test_annotations": "gone.json"}, r"There is no file .*gone\.json; set dataset\.test_annotations"),
        ({"classes": 4}, "dataset.classes=4 is more than the 3 categories"),
        ({"classes": ["dog", "persons"]}, "names persons, which is not a category of .*; did you mean person"),
        ({"classes": ["dog", "person", "dog"]}, "names dog twice"),
        ({"min_area": 10_000}, "dataset.classes=3 is more than the 0 categories"),
        ({"min_area": 10_000, "classes": ["dog", "person"]}, "dataset.classes names dog, and no image .* a single one"),
    ],
)
def test_wrong_keys_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(make(tmp_path))
    monkeypatch.setattr("icl_msr.data.files.read_image", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(UserError, match=words):
        coco(**{"root": ".", **keys(), "classes": 3, **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an annotation file in COCO's format"),
        (b"{", "not an annotation file in COCO's format .*JSON"),
        (b"\xff\xfe", "not an annotation file in COCO's format"),
        (b"[1]", "not an annotation file in COCO's format"),
        ({"images": None}, r"\(images"),
        ({"annotations": [{"image_id": 100, "caption": "a dog"}]}, r"\(annotations\.0\.category_id: Field required"),
        ({"annotations": [{"image_id": 100, "category_id": 1, "bbox": [1, 2, 3]}]}, r"annotations\.0\.bbox"),
        ({"annotations": [{"image_id": 100, "category_id": 1, "bbox": [1, 2, 3, "a"]}]}, r"annotations\.0\.bbox\.3"),
        ({"annotations": [{"image_id": 100, "category_id": 1, "bbox": [1, 2, 3, float("nan")]}]}, "finite"),
        ({"annotations": [{"image_id": 100, "category_id": 5, "bbox": [1, 2, 3, 4]}]}, "the category 5, which it"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 0, "height": 5}]}, r"images\.0\.width"),
    ],
)
def test_files_of_another_format_are_refused(tmp_path: Path, content: bytes | dict[str, Any], words: str) -> None:
    make(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content}).encode()
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"categories": 0, "id": 17}, "has two categories with the id 17"),
        ({"images": 1, "id": 100}, "has two images with the id 100"),
        ({"images": 1, "file_name": "000000000000.png"}, r"has twice the image 000000000000\.png"),
        ({"images": 0, "file_name": "../val2017/000000000001.png"}, r"names \.\./val2017/.*, which leads out of"),
        ({"images": 2, "file_name": "gone.png"}, r"There is no image .*train2017/gone\.png, which"),
        ({"annotations": -1, "bbox": [40, 20, 20, 10]}, r"The box of 000000000000\.png .* reaches 12 pixels beyond"),
    ],
)
def test_objects_that_cannot_be_told_apart_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = make(tmp_path) / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    (table, row), (key, value) = change.items()
    content[table][row][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_images_that_do_not_show_one_object_are_counted(tmp_path: Path) -> None:
    notes = read(make(tmp_path)).notes
    assert notes == (f"5 images of {tmp_path}/train2017 do not show one object of a class and are left out.",)


def test_test_images_of_other_classes_alone_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", TRAIN)
    write(tmp_path, "val", [[seen(18, *BOX)]])
    with pytest.raises(UserError, match=r"val2017\.json has no image .* classes, person, wine glass; set"):
        read(tmp_path, classes=2)


# ------------------------------------------------------------------------------------------------- the program


@pytest.mark.slow
def test_the_whole_program(tmp_path: Path) -> None:
    """Pre-trained on foregrounds, decoded by workers, and tested in every condition."""
    write(tmp_path / "coco", "train", TRAIN * 8)
    write(tmp_path / "coco", "val", TEST * 4)
    programs = Programs(tmp_path / "programs")
    words = ["dataset=coco", f"dataset.root={tmp_path}/coco", "dataset.classes=3", "dataset.image_size=32"]
    words += ["dataset.train_on=fg", "dataset.resident_size=0", "loader.batch_size=8", "hardware=cpu", "logger=csv"]
    words += [
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "evaluation=light",
        f"hydra.run.dir={tmp_path}/run",
    ]
    try:
        program = programs.start(*words, f"hydra.run.dir={tmp_path}/run")
        assert program.wait() == 0, program.err
    finally:
        programs.close()
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {row["split"] for row in results["records"]["accuracy"]} >= {"full", "fg", "crop", "only_fg", "only_bg"}
    gaps = results["records"]["gap"]
    assert {(row["split"], row["minus"]) for row in gaps} >= {("full", "fg"), ("fg", "crop")}
