"""Layouts of folders: what is read, what is passed over and said, what is refused; boxes and masks too."""

import os
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image

from icl_msr.core.errors import UserError
from icl_msr.data.arrays import arrays
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.folders import imagefolder


def picture(seed, size=(32, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def make(root, *folders, count=2):
    """Images 0.png, 1.png, ... in each folder."""
    for k, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(100 * k + i).save(root / folder / f"{i}.png")
    return root


def read(root, **changes):
    keys = {"train": None, "tests": None, "split": 0.25, "boxes": None, "masks": None, "image_size": 32}
    keys |= {"train_on": "full", "resident_size": 0, "memory_budget_gb": 1.0, "shifted": {}, "renamed": {}}
    return imagefolder(root=str(root), **(keys | changes))


SPLIT = ("train/cat", "train/dog", "val/cat", "val/dog")


# ------------------------------------------------------------------------------------------------- what is passed over


def test_hidden_files_and_litter_are_no_images(tmp_path):
    make(tmp_path, *SPLIT)
    cat = tmp_path / "train/cat"
    make(cat, ".ipynb_checkpoints", "@eaDir/0.png", "__MACOSX")
    for name in ("._0.png", ".hidden.jpg", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (cat / name).write_bytes(b"x")
    make(tmp_path, "train/__MACOSX/cat", "train/.cache")
    data = read(tmp_path)
    assert list(data.classes) == ["cat", "dog"]
    assert len(data.train) == 4
    (note,) = data.notes
    assert "hidden" in note
    assert "litter (@eaDir)" in note
    assert "litter (__MACOSX)" in note


def test_what_is_no_file_is_passed_over_and_said(tmp_path):
    make(tmp_path, *SPLIT)
    (tmp_path / "train/cat/x.jpg").mkdir()
    os.mkfifo(tmp_path / "train/cat/pipe.png")
    (tmp_path / "train/dog/gone.png").symlink_to("nowhere.png")
    data = read(tmp_path)
    assert len(data.train) == 4
    assert "1 neither files nor folders" in data.notes[0]
    assert "1 broken links" in data.notes[0]


def test_unknown_suffixes_and_loose_images_are_counted(tmp_path):
    make(tmp_path, *SPLIT)
    for name in ("a.heic", "b.HEIC", "c.txt", "d"):
        (tmp_path / "train/cat" / name).write_bytes(b"x")
    picture(0).save(tmp_path / "train/loose.png")
    (note,) = read(tmp_path).notes
    for words in ("2 .heic files", "1 .txt files", "1 suffixless files", "1 images beside the class folders"):
        assert words in note


def test_litter_of_other_systems_is_no_class(tmp_path):
    litter = ("@Recycle", "@tmp", "#snapshot", "Network Trash Folder", "Temporary Items", "system volume information")
    make(tmp_path, *SPLIT, *(f"train/{name}" for name in litter))
    (tmp_path / "train/cat/THUMBS.DB").write_bytes(b"x")
    data = read(tmp_path)
    assert list(data.classes) == ["cat", "dog"]
    assert all(f"litter ({name})" in data.notes[0] for name in litter)


def test_what_other_folders_skip_is_said_too(tmp_path):
    make(tmp_path / "data", *SPLIT)
    other = make(tmp_path / "other", "cat", "dog", "bird")
    (other / "cat/x.heic").write_bytes(b"x")
    notes = read(tmp_path / "data", shifted={"sketch": str(other)}).notes
    assert notes[0] == f"bird in {other} are not training classes and are left out."
    assert notes[1] == f"Passed over in {other}: 1 .heic files."


@pytest.mark.parametrize("what", ["file", "folder", "class"])
def test_links_out_of_the_root_are_said_and_followed_on_demand(tmp_path, what):
    root, outside = make(tmp_path / "data", *SPLIT), make(tmp_path / "outside", "more")
    link, target = {
        "file": (root / "train/cat/link.png", outside / "more/0.png"),
        "folder": (root / "train/cat/link", outside / "more"),
        "class": (root / "train/eel", outside / "more"),
    }[what]
    link.symlink_to(target)
    data = read(root)
    assert len(data.train) == 4
    assert "1 links that lead out of it; dataset.follow_links=true reads" in data.notes[0]
    data = read(root, follow_links=True)
    assert (len(data.train), data.notes) == ({"file": 5, "folder": 6, "class": 6}[what], ())


def test_links_inside_the_root_are_followed_and_never_in_a_circle(tmp_path):
    make(tmp_path, *SPLIT)
    (tmp_path / "train/cat/again.png").symlink_to(tmp_path / "val/cat/0.png")
    (tmp_path / "train/dog/circle").symlink_to(tmp_path / "train")
    (tmp_path / "train/dog/self").symlink_to(tmp_path / "train/dog")
    data = read(tmp_path)
    assert data.train.labels.tolist().count(0) == 3
    assert len(data.train) == 5
    assert "2 links to a folder above" in data.notes[0]


def test_a_class_of_links_alone_says_why_it_is_empty(tmp_path):
    root = make(tmp_path / "data", *SPLIT)
    (root / "train/eel").mkdir()
    (root / "train/eel/0.png").symlink_to(make(tmp_path / "outside", "x") / "x/0.png")
    with pytest.raises(UserError, match=r"eel has no images.*1 links that lead out of it; dataset.follow_links=true"):
        read(root)


# ------------------------------------------------------------------------------------------------- names of splits


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("train", "valid"), ("training", "validation"), ("TRAIN", "VAL"),
                        ("training_set", "test_set"), ("Training", "Testing")]
)  # fmt: skip
def test_splits_are_known_by_any_spelling(tmp_path, train, test):
    make(tmp_path, *(f"{part}/{name}" for part in (train, test) for name in ("cat", "dog")))
    data = read(tmp_path)
    assert (list(data.classes), len(data.train), list(data.tests)) == (["cat", "dog"], 4, ["test"])
    assert all(f"/{test}/" in file for file in data.tests["test"].files)


def test_siblings_of_train_that_are_not_read_are_said(tmp_path):
    make(tmp_path, *SPLIT, "test/cat", "unlabelled")
    assert read(tmp_path).notes == (
        f"test, unlabelled in {tmp_path} are not read; dataset.tests and dataset.extra name what is read.",
    )
    make(tmp_path, "masks/train")
    (note,) = read(tmp_path, tests=["test"], shifted={"other": str(tmp_path / "val")}).notes
    assert note.startswith("masks, unlabelled in ")


def test_two_spellings_of_one_split_are_refused(tmp_path):
    make(tmp_path, *SPLIT, "Train/cat")
    with pytest.raises(UserError, match=r"Train and .*train are both called train"):
        read(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    """As one of COCO is: its folder holds images, and its siblings are no splits."""
    make(tmp_path, "bus", "test", "train", count=4)
    data = read(tmp_path)
    assert list(data.classes) == ["bus", "test", "train"]
    assert len(data.train) == 9


def test_folders_that_look_like_splits_are_no_classes(tmp_path):
    make(tmp_path / "a", "photo/cat", "photo/dog", "sketch/cat", "sketch/dog", count=4)
    with pytest.raises(
        UserError, match=r"photo, sketch, and each of them has the folders cat, dog, .* dataset.train=\."
    ):
        read(tmp_path / "a")
    assert list(read(tmp_path / "a", train=".").classes) == ["photo", "sketch"]
    make(tmp_path / "b", "test/cat", "test/dog", "valid/cat")
    with pytest.raises(UserError, match="has a folder valid and no training folder"):
        read(tmp_path / "b")
    make(tmp_path / "c/inner", *SPLIT)
    with pytest.raises(UserError, match=r"holds the training folder; set dataset.root=.*inner"):
        read(tmp_path / "c")


def test_a_test_folder_inside_the_training_folder_is_refused(tmp_path):
    make(tmp_path, "original/val/cat", "other/val/cat")
    with pytest.raises(UserError, match="original/val lies in the training folder"):
        read(tmp_path, tests=["original/val"])


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        (["original/val", "mixed_same/val", "only_fg/val"], ["original", "mixed_same", "only_fg"]),
        (["a/x/val/full", "b/x/val/full"], ["a", "b"]),
        (["a/one", "b/one", "b/two"], ["a-one", "b-one", "b-two"]),
        (["sketch", "photo"], ["sketch", "photo"]),
    ],
)
def test_test_folders_of_one_last_name_are_splits_of_their_own(tmp_path, tests, names):
    make(tmp_path, "train/cat", "train/dog", *(f"{test}/{name}" for test in tests for name in ("cat", "dog")))
    data = read(tmp_path, tests=tests)
    assert list(data.tests) == names
    for name, test in zip(names, tests, strict=True):
        assert data.tests[name].files[0] == str(tmp_path / test / "cat/0.png")


def test_one_test_folder_named_twice_is_refused(tmp_path):
    make(tmp_path, *SPLIT)
    with pytest.raises(UserError, match=r"names .*val twice"):
        read(tmp_path, tests=["val", "./val"])
    with pytest.raises(UserError, match="empty list"):
        read(tmp_path, tests=[])


def test_folders_that_sound_like_splits_are_no_classes(tmp_path):
    """As in Kaggle's sets of scenes and of cats and dogs, whose archives repeat the folder's name."""
    make(tmp_path / "a", *(f"seg_{part}/seg_{part}/{name}" for part in ("train", "test") for name in ("sea", "street")))
    with pytest.raises(UserError, match=r"seg_test has folders of its own and the name of a split"):
        read(tmp_path / "a")
    make(tmp_path / "b", "images_train/cat", "images_val/cat", count=4)
    with pytest.raises(UserError, match=r"images_\w+ has folders of its own and the name of a split"):
        read(tmp_path / "b")
    parts = ("training_set", "test_set")
    make(tmp_path / "c", *(f"{part}/{part}/{name}" for part in parts for name in ("cat", "dog")))
    with pytest.raises(UserError, match=r"one folder, training_set, .* dataset\.train=training_set/training_set"):
        read(tmp_path / "c")
    data = read(tmp_path / "c", train="training_set/training_set", tests=["test_set/test_set"])
    assert (list(data.classes), len(data.tests["test_set"])) == (["cat", "dog"], 4)
    make(tmp_path / "d", "vest", "contest", "trainer", count=4)
    assert len(read(tmp_path / "d").classes) == 3


# ------------------------------------------------------------------------------------------------- names of classes


def test_accents_in_two_forms_are_one_class(tmp_path):
    composed, taken_apart = (normalize(form, "café") for form in ("NFC", "NFD"))
    make(tmp_path, f"train/{composed}", "train/tea", f"val/{taken_apart}", "val/tea")
    data = read(tmp_path)
    assert list(data.classes) == [composed, "tea"]
    assert data.tests["test"].labels.tolist() == [0, 0, 1, 1]
    make(tmp_path, f"train/{taken_apart}")
    with pytest.raises(UserError, match="two forms of Unicode"):
        read(tmp_path)


def test_classes_that_differ_by_spelling_alone_are_said(tmp_path):
    make(tmp_path, "train/Cat", "train/cat", "train/dog", "val/cat", "val/dog")
    remarks = read(tmp_path).remarks()
    assert "are called cat but for their spelling" in remarks[-1]
    assert any("1 of the 3 classes" in remark and "no test image: Cat" in remark for remark in remarks)


def test_one_class_is_said(tmp_path):
    make(tmp_path, "all", count=8)
    assert "has one class, all, so that no accuracy means anything" in read(tmp_path).remarks()[0]


def test_classes_are_chosen_by_a_list_or_a_file(tmp_path):
    make(tmp_path, *(f"{part}/{name}" for part in ("train", "val") for name in ("ant", "bee", "cat")))
    (tmp_path / "few.txt").write_text("# two\ncat Felis catus\n\nant, an insect\n")
    for classes in (["cat", "ant"], "few.txt", str(tmp_path / "few.txt")):
        data = read(tmp_path, classes=classes)
        assert list(data.classes) == ["cat", "ant"]
        assert [Path(file).parent.name for file in data.train.files] == ["cat", "cat", "ant", "ant"]
        assert data.tests["test"].labels.tolist() == [0, 0, 1, 1]
        assert "1 class folders" in data.notes[0]
    for classes, words in (
        (["cat", "can"], "names can, which is not a folder of .*; did you mean cat"),
        (["cat", "cat"], "names cat twice"),
        ("gone", "no file gone for dataset.classes; choose one of imagenet100"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path, classes=classes)


# ------------------------------------------------------------------------------------------------- boxes and masks

COLUMNS = "split,class,file,xmin,ymin,xmax,ymax\n"


def boxed(root, *rows, image="0.png", **changes):
    (root / "boxes.csv").write_text(COLUMNS + "\n".join(rows))
    data = read(root, boxes="boxes.csv", **changes)
    return data, [
        box.tolist() for file, box in zip(data.train.files, data.train.boxes, strict=True) if file.endswith(image)
    ]


@pytest.fixture
def one_class(tmp_path):
    return make(tmp_path / "d", "train/cat", "val/cat", count=1)


VAL = "val,cat,0.png,0,0,9,9"


def test_several_boxes_of_an_image_are_one_mistake_or_one_rule(one_class):
    rows = ["train,cat,0.png,10,10,29,29", "train,cat,0.png,0,0,3,3", VAL]
    with pytest.raises(UserError, match=r"2 boxes for .*train/cat/0\.png; .*dataset.boxes_of=largest"):
        boxed(one_class, *rows)
    assert boxed(one_class, *rows, boxes_of="largest")[1] == [[10, 10, 30, 30]]
    assert boxed(one_class, *rows, boxes_of="union")[1] == [[0, 0, 30, 30]]
    assert boxed(one_class, rows[0], rows[0], VAL)[1] == [[10, 10, 30, 30]]


def test_boxes_are_found_by_the_path_below_the_class(one_class):
    make(one_class, "train/cat/a", "train/cat/b", count=1)
    rows = ["train,cat,a/0.png,1,1,2,2", "train,cat,b/0.png,3,3,4,4", "train,cat,0.png,5,5,6,6", VAL]
    assert boxed(one_class, *rows)[1] == [[5, 5, 7, 7], [1, 1, 3, 3], [3, 3, 5, 5]]
    with pytest.raises(UserError, match=r"has a box for 0\.png of class cat, which has several images of that name"):
        boxed(one_class, *rows[2:])
    shutil.rmtree(one_class / "train/cat/b")
    (one_class / "train/cat/0.png").unlink()
    assert boxed(one_class, rows[2], VAL)[1] == [[5, 5, 7, 7]]


@pytest.mark.parametrize("box", ["0,0,32,9", "0,0,9,32", "20,20,40,40", "40,40,50,50"])
@pytest.mark.parametrize("resident_size", [0, 96])
def test_boxes_beyond_the_image_are_refused_before_training(one_class, box, resident_size):
    with pytest.raises(UserError, match=r"The box of .*val/cat/0\.png, x .* lies outside the image of 32 x 32"):
        boxed(one_class, "train,cat,0.png,0,0,9,9", f"val,cat,0.png,{box}", resident_size=resident_size)


def test_boxes_of_images_that_are_not_there_are_counted(one_class):
    data, _ = boxed(one_class, "train,cat,0.png,0,0,9,9", VAL, "val,cat,gone.png,0,0,9,9")
    assert data.notes == ("boxes.csv has boxes of 1 images that are not there, such as cat/gone.png.",)


def test_splits_of_one_last_name_are_told_apart_in_the_table(tmp_path):
    make(tmp_path, "train/cat", "a/val/cat", "b/val/cat", count=1)
    rows = ["train,cat,0.png,0,0,9,9", "a/val,cat,0.png,1,1,9,9", "b/val,cat,0.png,2,2,9,9"]
    data, _ = boxed(tmp_path, *rows, tests=["a/val", "b/val"])
    assert [data.tests[f"{name}_full"].boxes.tolist() for name in "ab"] == [[[1, 1, 10, 10]], [[2, 2, 10, 10]]]
    with pytest.raises(UserError, match=r"no box for .*a/val/cat/0\.png"):
        boxed(tmp_path, rows[0], VAL, tests=["a/val", "b/val"])


@pytest.mark.parametrize("resident_size", [0, 96])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((32, 32), np.uint8), r"The mask .*val/cat/0\.png is empty"),
        (np.ones((32, 32), np.uint8), r"The mask .*val/cat/0\.png covers the whole image"),
        (np.eye(16, dtype=np.uint8), r"The mask .*val/cat/0\.png of 16 x 16 and the image .* of 32 x 32 differ"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused_before_training(one_class, mask, words, resident_size):
    for part in ("train", "val"):
        (one_class / "masks" / part / "cat").mkdir(parents=True)
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(one_class / "masks" / part / "cat/0.png")
    assert read(one_class, masks="masks", resident_size=resident_size)
    Image.fromarray(mask).save(one_class / "masks/val/cat/0.png")
    with pytest.raises(UserError, match=words):
        read(one_class, masks="masks", resident_size=resident_size)


def test_two_images_never_share_a_mask(one_class):
    for part in ("train", "val"):
        (one_class / "masks" / part / "cat").mkdir(parents=True)
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(one_class / "masks" / part / "cat/0.png")
    picture(5).save(one_class / "train/cat/0.jpg")
    with pytest.raises(UserError, match=r"0\.jpg and .*0\.png would share the mask"):
        read(one_class, masks="masks")


def test_an_image_has_one_mask_inside_the_folder_of_masks(one_class, tmp_path):
    for part in ("train", "val"):
        (one_class / "masks" / part / "cat").mkdir(parents=True)
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(one_class / "masks" / part / "cat/0.png")
    mask = one_class / "masks/val/cat/0.png"
    (one_class / "masks/val/cat/._0.png").write_bytes(b"x")
    assert read(one_class, masks="masks")
    shutil.copy(mask, mask.with_suffix(".bmp"))
    with pytest.raises(UserError, match=r"val/cat/0\.png has the masks .*0\.bmp and .*0\.png; keep one"):
        read(one_class, masks="masks")
    mask.with_suffix(".bmp").unlink()
    mask.rename(tmp_path / "elsewhere.png")
    mask.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(UserError, match=r"has no mask .*1 links that lead out of it"):
        read(one_class, masks="masks")
    assert read(one_class, masks="masks", follow_links=True)


def test_a_shifted_and_a_corrupted_split_have_their_own_names(tmp_path):
    make(tmp_path, *SPLIT, "C/fog/3/cat", "fogs/cat")
    with pytest.raises(UserError, match=r"dataset\.shifted\.fog_3 is a split of dataset\.corrupted too"):
        read(tmp_path, shifted={"fog_3": str(tmp_path / "fogs")}, corrupted="C")


# ------------------------------------------------------------------------------------------------- labels of arrays


def labelled(path, train, test, **more):
    images = np.random.default_rng(0).integers(0, 256, (len(train) + len(test), 8, 8, 3), dtype=np.uint8)
    np.savez(
        path,
        train_images=images[: len(train)],
        train_labels=np.array(train),
        test_images=images[len(train) :],
        test_labels=np.array(test),
        **more,
    )
    return arrays(path=str(path), image_size=None, train_on="full")


def test_labels_count_from_nought(tmp_path):
    with pytest.raises(UserError, match=r"x\.npz has labels from 1 to 3 .*must count from 0"):
        labelled(tmp_path / "x.npz", [1, 2, 3, 1], [1, 2])
    with pytest.raises(UserError, match="labels from 0 to 4000"):
        labelled(tmp_path / "x.npz", [0, 4000], [0])
    with pytest.raises(UserError, match="label 3 and only 3 classes"):
        labelled(tmp_path / "x.npz", [1, 2, 3], [1], classes=np.array(["a", "b", "c"]))


def test_gaps_in_labels_and_classes_without_images_are_said(tmp_path):
    remarks = labelled(tmp_path / "x.npz", [0, 2, 2, 5, -1], [0, 5]).remarks()
    assert remarks[0] == "3 of the 6 classes of x have no training image: 1, 3, 4."
    assert "no test image: 1, 2, 3, 4" in remarks[1]
    assert labelled(tmp_path / "x.npz", [0, 1, 2], [2, 1, 0]).remarks() == []


def test_images_without_a_label_are_counted_and_never_tested_on(tmp_path):
    assert labelled(tmp_path / "x.npz", [0, 1, -1], [0, 1]).remarks() == [
        "1 of the 3 training images of x have no label."
    ]
    split = ArraySplit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, -1]))
    with pytest.raises(UserError, match="mine has negative labels in test"):
        Dataset("mine", ("a", "b"), 8, split, {"test": split})


def test_two_lists_of_classes_agree(tmp_path):
    labelled(tmp_path / "x.npz", [0, 1], [0, 1])
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"]), ("c", ["cat", "dog"])):
        np.savez(tmp_path / f"{name}.npz", classes=np.array(classes))
    paths = {name: str(tmp_path / f"{name}.npz") for name in "xabc"}
    assert arrays(path=[paths["x"], paths["a"], paths["c"]], image_size=None, train_on="full").classes == ["cat", "dog"]
    with pytest.raises(UserError, match=r"classes is in .*b\.npz and in another file"):
        arrays(path=[paths["x"], paths["a"], paths["b"]], image_size=None, train_on="full")


@pytest.mark.parametrize(("value", "words"), [(0, "is empty"), (1, "covers the whole image")])
def test_masks_in_arrays_show_an_object(tmp_path, value, words):
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2, 2], masks[1] = True, value
    with pytest.raises(UserError, match=rf"Mask 1 of test_masks in .*x\.npz {words}"):
        labelled(tmp_path / "x.npz", [0, 1], [0, 1], test_masks=masks)


def test_a_label_without_a_class_is_refused_in_any_data_set(tmp_path):
    split = ArraySplit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2]))
    with pytest.raises(UserError, match="mine has the label 2 in train and only 2 classes"):
        Dataset("mine", ("a", "b"), 8, split, {})
