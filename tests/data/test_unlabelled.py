"""Images without labels: any folders, lists of paths, another data set's labels; a run from beginning to report."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import inprocess

from icl_msr.core.errors import UserError
from icl_msr.data.files import FileSplit
from icl_msr.data.unlabelled import images


def picture(path, seed, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def flat(tmp_path):
    """20 images at three depths, beside litter."""
    for i in range(20):
        picture(tmp_path / "flat" / ("" if i < 10 else "a" if i < 15 else "a/b/c") / f"{i:02}.png", i)
    picture(tmp_path / "flat/.cache/x.png", 0)
    (tmp_path / "flat/notes.txt").write_text("hello")
    return tmp_path / "flat"


@pytest.fixture
def labelled(tmp_path):
    for part, count in (("train", 6), ("val", 3)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(tmp_path / "labelled" / part / name / f"{i}.png", 100 * k + i + 50 * (part == "val"))
    keys = {"train": None, "tests": None, "split": 0.1, "boxes": None, "masks": None, "image_size": 16}
    keys |= {"train_on": "full", "resident_size": 96, "memory_budget_gb": 1.0, "shifted": {}, "renamed": {}}
    return {"_target_": "icl_msr.data.folders.imagefolder", "root": str(tmp_path / "labelled"), **keys}


def read(root, **changes):
    keys = {"split": 0.1, "labelled": None, "image_size": 16, "resident_size": 96, "memory_budget_gb": 1.0}
    return images(root=root, **(keys | {"follow_links": False} | changes))


@pytest.mark.parametrize("resident_size", [0, 96])
def test_a_folder_of_any_depth_has_no_labels(flat, resident_size):
    data = read(str(flat), resident_size=resident_size)
    assert (list(data.classes), data.classified, len(data.train), list(data.tests)) == ([], False, 18, ["held_out"])
    assert data.train.labels.tolist() == [-1] * 18
    assert isinstance(data.train, FileSplit) == (resident_size == 0)
    assert sorted([*data.train.files, *data.tests["held_out"].files]) == sorted(map(str, flat.rglob("[0-9]*.png")))
    assert list(read(str(flat)).train.files) == list(data.train.files)
    assert "flat has no labels" in data.remarks()[0]
    assert "1 hidden, 1 .txt files" in data.remarks()[1]


def test_several_roots_and_lists_of_paths_are_one_set(flat, tmp_path):
    (tmp_path / "list.txt").write_text("flat/00.png\n\nflat/a/11.png\n" + str(flat / "01.png") + "\n")
    data = read(str(tmp_path / "list.txt"), split=0.4)
    assert {Path(file).name for file in [*data.train.files, *data.tests["held_out"].files]} == {
        "00.png",
        "11.png",
        "01.png",
    }
    both = read([str(flat / "a"), str(tmp_path / "list.txt")])
    assert len(both.train) + len(both.tests["held_out"]) == 12
    assert "1 images are named more than once" in both.notes[1]


def test_wrong_roots_are_refused(flat, tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "list.txt").write_text("flat/00.png\nflat/gone.png\n")
    for root, words in (
        ("gone", "There is no folder gone"),
        (str(flat / "00.png"), "There is no folder .*00.png; name a folder of images, or a text file"),
        (str(tmp_path / "hollow"), "hollow has no images"),
        (str(tmp_path / "list.txt"), r"no image .*gone\.png, which .*list\.txt names"),
    ):
        with pytest.raises(UserError, match=words):
            read(root)


def test_another_data_set_gives_the_labels(flat, labelled):
    data = read(str(flat), labelled=labelled)
    assert (len(data.train), dict(data.tests), data.classified) == (20, {}, False)
    measured = data.evaluated
    assert (list(measured.classes), len(measured.train), list(measured.tests)) == (["cat", "dog"], 12, ["test"])
    assert (measured.mean, measured.std) == (data.mean, data.std)
    assert measured.evaluated is measured


def test_wrong_labelled_sets_are_refused(flat, labelled):
    for wrong, words in (
        ("cifar11", "is not a choice of dataset; did you mean cifar10"),
        ("imagefolder", r"needs the key root; type \+dataset@dataset\.labelled=imagefolder dataset\.labelled\.root="),
        (labelled | {"image_size": 8}, "have 8 pixels and those that are trained on 16; set dataset.image_size=8"),
        (labelled | {"rot": 1}, r"dataset\.labelled\.rot is not a key"),
        ({"_target_": "icl_msr.data.unlabelled.images", "root": str(flat), "split": 0.1, "labelled": None,
          "image_size": 16, "resident_size": 0, "memory_budget_gb": 1.0, "follow_links": False}, "no data set of two"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read(str(flat), labelled=wrong)


# ------------------------------------------------------------------------------------------------- the program

WORDS = ["backbone=tiny", "method=simclr", "regularizer=none", "hardware=cpu", "logger=csv", "loader.batch_size=8"]
WORDS += ["dataset.image_size=16", "trainer.max_epochs=1", "evaluation=light"]


@pytest.mark.filterwarnings("error:Initializing zero-element")
def test_a_run_without_labels_reports_what_needs_none(flat, tmp_path):
    folder = tmp_path / "run"
    answer = inprocess.execute(*[*WORDS, "dataset=images", f"dataset.root={flat}", f"hydra.run.dir={folder}"])
    assert answer.code == 0, answer.err
    assert "flat has no labels" in answer.out
    results = json.loads((folder / "results.json").read_text())
    assert "accuracy" not in results["records"]
    assert {row["split"] for row in results["records"]["health"]} == {"held_out"}
    assert not any(name.startswith("online/") for name in results["final"])
    page = (folder / "report.html").read_text()
    assert "This run had no labels of two or more classes" in page
    assert (folder / "figures/neighbours.png").is_file()
    more = inprocess.execute(*[f"resume={folder}", "trainer.max_epochs=2"])
    assert more.code == 0, more.err


def test_a_run_is_measured_on_the_labelled_set(flat, labelled, tmp_path):
    folder = tmp_path / "run"
    words = [*WORDS, "dataset=images", f"dataset.root={flat}", f"hydra.run.dir={folder}"]
    words += ["+dataset@dataset.labelled=imagefolder", f"dataset.labelled.root={labelled['root']}"]
    words += ["dataset.labelled.image_size=16"]
    answer = inprocess.execute(*words)
    assert answer.code == 0, answer.err
    results = json.loads((folder / "results.json").read_text())
    assert {(row["fitted_on"], row["split"], row["n"]) for row in results["records"]["accuracy"]} == {
        ("train", "test", 6)
    }
    assert "online/knn" in results["final"]
    assert "online/probe" not in results["final"]
    assert results["classes"] == ["cat", "dog"]
    more = inprocess.execute(f"resume={folder}", "trainer.max_epochs=2")
    assert more.code == 0, more.err


def test_one_class_has_no_accuracy(tmp_path):
    for i in range(12):
        picture(tmp_path / f"one/all/{i}.png", i)
    folder = tmp_path / "run"
    words = ["dataset=imagefolder", f"dataset.root={tmp_path}/one", f"hydra.run.dir={folder}"]
    answer = inprocess.execute(*[*WORDS, *words])
    assert answer.code == 0, answer.err
    assert "one has one class, all" in answer.out
    assert "accuracy" not in json.loads((folder / "results.json").read_text())["records"]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("method=supervised", "method=supervised learns to tell classes apart, and the data set has no classes"),
        ("evaluation=finetune", "flat has no labels, and this evaluation fits classifiers to labels"),
        ("evaluation=semi_supervised", "flat has no labels"),
        ("metric=online/knn", "metric=online/knn will not be measured"),
    ],
)
def test_what_needs_labels_refuses_in_one_sentence(flat, tmp_path, word, sentence):
    words = [*WORDS, "dataset=images", f"dataset.root={flat}", word, f"hydra.run.dir={tmp_path}/run"]
    answer = inprocess.execute(*words)
    assert answer.code == 2
    assert sentence in answer.err
    assert answer.err.strip().count("\n") == 0


# ------------------------------------------------------------------------------------------------- data that changed


@pytest.mark.parametrize("change", ["an image less", "a class more", "another class", "another image"])
def test_a_run_goes_on_with_the_data_that_it_was_begun_with(labelled, tmp_path, change):
    root, folder = Path(labelled["root"]), tmp_path / "run"
    words = [*WORDS, "dataset=imagefolder", f"dataset.root={root}", f"hydra.run.dir={folder}", "evaluation=none"]
    assert inprocess.execute(*words, "metric=loss").code == 0
    if change == "an image less":
        (root / "train/cat/3.png").unlink()
        said = "begun with 12 training images of 2 classes, and there are 11 training images of 2 classes now"
    elif change == "a class more":
        picture(root / "train/eel/0.png", 5)
        said = "and there are 13 training images of 3 classes now"
    elif change == "another image":
        (root / "train/cat/3.png").rename(root / "train/cat/9.png")
        said = "with other images in place of its 12 training images of 2 classes"
    else:
        (root / "train/cat/3.png").rename(root / "train/dog/9.png")
        said = "with other labels of its 12 training images of 2 classes"
    answer = inprocess.execute(f"resume={folder}", "trainer.max_epochs=2")
    assert answer.code == 2
    assert said in answer.err
    assert answer.err.strip().count("\n") == 0
