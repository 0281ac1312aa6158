"""Data sets as they are published, each on a miniature."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from support.tiny import composed
from torchvision import datasets as torchvision_datasets

from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.data.sources import read_image
from icl_msr.data.torchvision_sets import _corrupted, stl10

WNIDS = ("n01440764", "n01443537", "n02102040")


def picture(path, seed=0, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def opened(*words):
    """The data set that a command line opens."""
    return build(check(composed(*words, "dataset.image_size=32", "dataset.resident_size=0")).dataset)


def names(split):
    return [Path(file).name for file in split.files]


@pytest.fixture
def imagenet(tmp_path):
    """train/<wnid>, and a flat val whose classes are 2, 0, 1, 0."""
    for k, wnid in enumerate(WNIDS):
        for i in range(3):
            picture(tmp_path / f"train/{wnid}/{wnid}_{i}.JPEG", 10 * k + i)
    for i in range(1, 5):
        picture(tmp_path / f"val/ILSVRC2012_val_{i:08}.JPEG", i)
    return tmp_path


TRUTH = (2, 0, 1, 0)


def ground_truth(root, form):
    if form == "caffe":
        lines = [f"ILSVRC2012_val_{i:08}.JPEG {label}" for i, label in enumerate(TRUTH, 1)]
        (root / "val.txt").write_text("\n".join(lines))
    elif form == "kaggle":
        rows = [f"ILSVRC2012_val_{i:08},{WNIDS[label]} 1 2 3 4 " for i, label in reversed(list(enumerate(TRUTH, 1)))]
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))
    else:
        data = root / "ILSVRC2012_devkit_t12/data"
        data.mkdir(parents=True)
        numbers = (490, 1, 361)  # the devkit's own, in no order of ours
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(str(numbers[k]) for k in TRUTH))
        rows = np.array(list(zip(numbers, WNIDS, strict=True)), dtype=[("ILSVRC2012_ID", float), ("WNID", object)])
        savemat(data / "meta.mat", {"synsets": rows})


@pytest.mark.parametrize("form", ["caffe", "kaggle", "devkit"])
def test_imagenet_with_a_flat_val(imagenet, form):
    with pytest.raises(UserError, match=r"val has no class folders; set dataset\.labels"):
        opened("dataset=imagefolder", f"dataset.root={imagenet}")
    ground_truth(imagenet, form)
    data = opened("dataset=imagefolder", f"dataset.root={imagenet}")
    assert list(data.classes) == list(WNIDS)
    assert data.tests["test"].labels.tolist() == list(TRUTH)
    assert names(data.tests["test"]) == [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 5)]
    few = opened("dataset=imagefolder", f"dataset.root={imagenet}", f"dataset.classes=[{WNIDS[2]},{WNIDS[0]}]")
    assert few.tests["test"].labels.tolist() == [0, 1, 1]
    assert few.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_ground_truth_that_does_not_fit_is_refused(imagenet):
    (imagenet / "mine.txt").write_text("ILSVRC2012_val_00000001.JPEG 0\n")
    for content, words in (
        ("ILSVRC2012_val_00000001.JPEG 0\n", "has no class for .*00000002"),
        ("ILSVRC2012_val_00000001.JPEG 7\n", "has the class 7, and the 3 training folders count from 0"),
        (
            f"ILSVRC2012_val_00000001.JPEG {'9' * 5000}\n",
            "has the class 9{30}, and the 3 training folders count from 0",
        ),
        (f"{'9' * 5000}\n", "is not the name of a file and its class"),
        ("ILSVRC2012_val_00000001.JPEG\n", "is not the name of a file and its class"),
        ("1\n2\n", r"put .*meta\.mat beside it"),
    ):
        (imagenet / "mine.txt").write_text(content)
        with pytest.raises(UserError, match=words):
            opened("dataset=imagefolder", f"dataset.root={imagenet}", "dataset.labels=mine.txt")
    with pytest.raises(UserError, match=r"There is no file .*gone\.txt"):
        opened("dataset=imagefolder", f"dataset.root={imagenet}", "dataset.labels=gone.txt")


def test_a_list_of_classes_tells_images_of_one_name_apart(imagenet):
    def tests(*rows):
        (imagenet / "val.txt").write_text("\n".join(rows))
        return opened("dataset=imagefolder", f"dataset.root={imagenet}").tests["test"].labels.tolist()

    for file in (imagenet / "val").iterdir():
        file.unlink()
    picture(imagenet / "val/images/a/0.png")
    picture(imagenet / "val/images/b/0.png")
    assert tests("a/0.png 0", "b/0.png 2") == tests("images/a/0 0", "val/images/b/0.png 2") == [0, 2]
    with pytest.raises(UserError, match=r"names 0\.png, and .* has several images of that name; write their paths"):
        tests("0.png 1")
    with pytest.raises(UserError, match=r"gives a/0\.png the classes n01440764 and n01443537; keep one line"):
        tests("a/0.png 0", "a/0.png 1", "b/0.png 2")
    assert tests("a/0.png 0", "a/0.png 0", "b/0.png 2") == [0, 2]
    (imagenet / "val/images/b/0.png").rename(imagenet / "val/images/a/0.jpg")
    assert tests("0.jpg 1", "0.png 2") == [1, 2]
    with pytest.raises(UserError, match="several images of that name"):
        tests("a/0 1")


def test_test_images_of_other_classes_are_counted(imagenet):
    ground_truth(imagenet, "kaggle")
    (imagenet / "LOC_val_solution.csv").write_text(
        (imagenet / "LOC_val_solution.csv").read_text().replace(WNIDS[1], "n09999999")
    )
    data = opened("dataset=imagefolder", f"dataset.root={imagenet}")
    assert data.tests["test"].labels.tolist() == [2, 0, 0]
    assert data.notes == (
        f"1 images of {imagenet}/val are of other classes by {imagenet}/LOC_val_solution.csv and are left out.",
    )


def test_imagenet_100_is_cmcs_list(tmp_path):
    lists = (Path(__file__).parents[2] / "icl_msr/data/lists/imagenet100.txt").read_text().splitlines()
    wnids = [line for line in lists if not line.startswith("#")]
    assert (len(wnids), len(set(wnids)), sorted(wnids)) == (100, 100, wnids)
    assert {"n02869837", "n02090622", "n13037406"} < set(wnids)  # its first, last and a mushroom
    for wnid in (*wnids, "n01440764"):
        picture(tmp_path / f"train/{wnid}/0.JPEG", size=(8, 8))
        picture(tmp_path / f"val/{wnid}/0.JPEG", size=(8, 8))
    data = opened("dataset=imagefolder", f"dataset.root={tmp_path}", "dataset.classes=imagenet100")
    assert (list(data.classes), len(data.train), len(data.tests["test"])) == (wnids, 100, 100)


@pytest.fixture
def tiny_imagenet(tmp_path):
    for k, wnid in enumerate(WNIDS):
        rows = []
        for i in range(2):
            picture(tmp_path / f"train/{wnid}/images/{wnid}_{i}.JPEG", 10 * k + i)
            rows.append(f"{wnid}_{i}.JPEG\t{i}\t1\t20\t31")
        (tmp_path / f"train/{wnid}/{wnid}_boxes.txt").write_text("\n".join(rows) + "\n")
        picture(tmp_path / f"val/images/val_{k}.JPEG", k)
    rows = [f"val_{k}.JPEG\t{WNIDS[2 - k]}\t0\t0\t31\t{20 + k}" for k in range(3)]
    (tmp_path / "val/val_annotations.txt").write_text("\n".join(rows))
    picture(tmp_path / "test/images/test_0.JPEG")
    return tmp_path


def test_tiny_imagenet_200_with_its_boxes(tiny_imagenet):
    data = opened("dataset=tiny_imagenet", f"dataset.root={tiny_imagenet}")
    assert (list(data.classes), data.train.labels.tolist()) == (list(WNIDS), [0, 0, 1, 1, 2, 2])
    assert list(data.tests) == ["full", "fg", "crop", "only_fg", "only_bg"]
    assert data.train.boxes.tolist()[:2] == [[0, 1, 21, 32], [1, 1, 21, 32]]
    assert data.tests["full"].labels.tolist() == [2, 1, 0]
    assert data.tests["full"].boxes.tolist() == [[0, 0, 32, 21 + k] for k in range(3)]
    plain = opened("dataset=imagefolder", f"dataset.root={tiny_imagenet}")
    assert plain.tests["test"].labels.tolist() == [2, 1, 0]
    for word in ("x", "9" * 5000):
        (tiny_imagenet / "val/val_annotations.txt").write_text(f"val_0.JPEG\tn01440764\t0\t{word}\t1\t2\n")
        with pytest.raises(UserError, match=r"Row 1 of .*val_annotations\.txt is not as published"):
            opened("dataset=tiny_imagenet", f"dataset.root={tiny_imagenet}")


def test_tables_of_tiny_imagenet_name_every_image_once(tiny_imagenet):
    words = "dataset=tiny_imagenet", f"dataset.root={tiny_imagenet}"
    assert opened(*words).notes == ()
    picture(tiny_imagenet / f"train/{WNIDS[0]}/images/more.JPEG")
    assert opened(*words).notes == (f"1 images of {tiny_imagenet} are in no table and are left out.",)
    table = tiny_imagenet / f"train/{WNIDS[0]}/{WNIDS[0]}_boxes.txt"
    row, secret = f"{WNIDS[0]}_0.JPEG\t0\t0\t9\t9\n", tiny_imagenet / "secret.JPEG"
    picture(secret)
    (table.parent / "images/link.JPEG").symlink_to(secret)
    for rows, sentence in (
        (row * 2, f"names {WNIDS[0]}_0.JPEG 2 times; keep one row"),
        ("gone.JPEG\t0\t0\t9\t9\n", r"There is no image .*images/gone\.JPEG, which .*_boxes\.txt names"),
        ("../../../secret.JPEG\t0\t0\t9\t9\n", r"names \.\./\.\./\.\./secret\.JPEG, which leads out"),
        (f"{secret}\t0\t0\t9\t9\n", r"secret\.JPEG, which leads out"),
        ("link.JPEG\t0\t0\t9\t9\n", r"link\.JPEG is a link that leads out"),
        ("", "is empty"),
    ):
        table.write_text(rows)
        with pytest.raises(UserError, match=sentence):
            opened(*words)


def test_imagenet_9_has_a_split_for_each_variation(tmp_path):
    variations = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b", "only_bg_t")
    for name in ("00_dog", "01_bird"):
        picture(tmp_path / f"original/train/{name}/0.JPEG")
        for variation in variations:
            picture(tmp_path / f"{variation}/val/{name}/0.JPEG")
    data = opened("dataset=imagenet9", f"dataset.root={tmp_path}")
    assert (list(data.tests), len(data.train)) == (list(variations), 2)


def test_imagenet_c_has_a_split_for_each_severity(imagenet):
    ground_truth(imagenet, "caffe")
    for path in ("blur/defocus_blur/1", "blur/defocus_blur/5", "fog/3"):
        picture(imagenet / f"C/{path}/{WNIDS[1]}/x.JPEG")
    data = opened("dataset=imagefolder", f"dataset.root={imagenet}", "dataset.corrupted=C")
    assert data.shifted == ("defocus_blur_1", "defocus_blur_5", "fog_3")
    assert data.tests["fog_3"].labels.tolist() == [1]
    with pytest.raises(UserError, match="<corruption>/<severity>/<class>"):
        opened("dataset=imagefolder", f"dataset.root={imagenet}", "dataset.corrupted=train")


def test_cifar_c_has_five_severities_in_a_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile([3, 7], 5))
    found = _corrupted(tmp_path)
    assert list(found) == [f"fog_{severity}" for severity in range(1, 6)]
    assert np.array_equal(found["fog_2"].images.permute(0, 2, 3, 1), images[2:4])
    assert found["fog_5"].labels.tolist() == [3, 7]
    (tmp_path / "._fog.npy").write_bytes(b"x")
    assert _corrupted(tmp_path).keys() == found.keys()
    np.save(tmp_path / "snow.npy", images[:7])
    with pytest.raises(UserError, match=r"snow\.npy is uint8 \(7, 32, 32, 3\)"):
        _corrupted(tmp_path)
    with pytest.raises(UserError, match=r"set dataset\.corrupted to CIFAR-10-C"):
        _corrupted(tmp_path / "gone")


def test_stl10_labels_one_fold(tmp_path, monkeypatch):
    kind = torchvision_datasets.STL10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.zeros((6, 3, 96, 96), np.uint8)
    for name, count in (("train", 4), ("unlabeled", 2), ("test", 2)):
        pixels[:count].tofile(folder / f"{name}_X.bin")
        np.array([1, 10, 3, 4][:count], np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {k}" for k in range(10)))
    (folder / "fold_indices.txt").write_text("0 1\n3 1\n" + "0 2\n" * 8)
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    data = stl10(root=str(tmp_path), download=False, image_size=96, train_on="full", fold=1)
    assert data.train.labels.tolist() == [-1, 9, -1, 3, -1, -1]
    assert len(data.tests["test"]) == 2


@pytest.fixture
def pets(tmp_path):
    rows = {"trainval": [("Abyssinian_1", 1), ("great_pyrenees_10", 2)], "test": [("great_pyrenees_2", 2)]}
    for part, listed in rows.items():
        (tmp_path / "annotations/trimaps").mkdir(parents=True, exist_ok=True)
        for name, _ in listed:
            picture(tmp_path / f"images/{name}.jpg")
            trimap = np.full((32, 32), 2, np.uint8)
            trimap[8:24, 8:24], trimap[10:22, 10:22] = 3, 1
            Image.fromarray(trimap).save(tmp_path / f"annotations/trimaps/{name}.png")
        text = "".join(f"{name} {number} 1 1\n" for name, number in listed)
        (tmp_path / f"annotations/{part}.txt").write_text("# Image CLASS-ID SPECIES BREED ID\n" + text)
    return tmp_path


def test_oxford_pets_with_their_trimaps(pets):
    data = opened("dataset=oxford_pets", f"dataset.root={pets}")
    assert list(data.classes) == ["Abyssinian", "great_pyrenees"]
    assert (data.train.labels.tolist(), data.tests["full"].labels.tolist()) == ([0, 1], [1])
    mask = data.tests["full"].mask(0, torch.zeros(3, 32, 32))
    assert mask.sum() == 144
    assert mask[10:22, 10:22].all()


@pytest.mark.parametrize("rows", ["Abyssinian_1 1 1 1\nbeagle_1 1 1 1\n", "beagle_1 1 1 1\nbeagle_2 3 1 1\n"])
def test_breeds_are_numbered_one_to_one(pets, rows):
    (pets / "annotations/trainval.txt").write_text(rows)
    with pytest.raises(UserError, match="do not number the breeds one to one"):
        opened("dataset=oxford_pets", f"dataset.root={pets}")


def test_a_missing_pet_is_named_before_training(pets):
    (pets / "images/Abyssinian_1.jpg").unlink()
    os.mkfifo(pets / "images/Abyssinian_1.jpg")
    with pytest.raises(UserError, match=r"There is no image .*Abyssinian_1\.jpg, which .*trainval\.txt names"):
        opened("dataset=oxford_pets", f"dataset.root={pets}")


def test_an_unlabelled_part_is_trained_on(imagenet):
    ground_truth(imagenet, "caffe")
    for i in range(3):
        picture(imagenet / f"more/deep/{i}.png")
    data = opened("dataset=imagefolder", f"dataset.root={imagenet}", "dataset.extra=more")
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 3
    assert not any("more" in note for note in data.notes)


def test_cocos_default_classes_are_the_papers():
    classes = check(composed("dataset=coco", "dataset.root=coco")).dataset["classes"]
    assert (len(set(classes)), classes[0], classes[-1]) == (30, "airplane", "zebra")


# ------------------------------------------------------------------------------------------------- Hugging Face


def table(datasets, count, seed=0, mode="jpeg"):
    rows = []
    for i in range(count):
        file = BytesIO()
        pixels = np.random.default_rng(seed + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, mode)
        rows.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"pic": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({"pic": rows, "kind": [i % 2 for i in range(count)]}, features=features), rows


@pytest.mark.parametrize("form", ["saved", "parquet", "file"])
def test_tables_of_the_datasets_library(tmp_path, monkeypatch, form):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (train, rows), (test, _) = table(datasets, 8), table(datasets, 4, seed=50)
    folder = tmp_path / "set"
    if form == "saved":
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        train.to_parquet(str(folder / "train-00000-of-00001.parquet"))
        test.to_parquet(str(folder / "test-00000-of-00001.parquet"))
    name, split = (folder, "test") if form != "file" else (folder / "train-00000-of-00001.parquet", "null")
    words = [f"dataset.name={name}", f"dataset.test={split}", "dataset.image=pic", "dataset.label=kind"]
    data = opened("dataset=huggingface", *words)
    assert list(data.classes) == ["cat", "dog"]
    assert (len(data.train), len(data.tests["test"])) == ((8, 4) if form != "file" else (7, 1))
    if form != "file":
        assert data.train.labels.tolist() == [0, 1] * 4
        for i in range(8):
            assert torch.equal(data.train.load(torch.tensor([i]))[0], read_image(rows[i]["bytes"], "x"))
    assert data.train.identity() != data.tests["test"].identity()
    with pytest.raises(UserError, match=r"dataset\.image=pick is not a column of .*; did you mean pic"):
        opened("dataset=huggingface", *words[:2], "dataset.image=pick", "dataset.label=kind")
    without = opened("dataset=huggingface", *words[:2], "dataset.image=pic", "dataset.label=null")
    assert (without.classified, set(without.train.labels.tolist())) == (False, {-1})


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([1, 2, 3, 1, 2, 3], r"The column kind has labels from 1 to 3 for 6 images; they must count from 0"),
        ([0, 1990, 0, 0, 0, 0], "has labels from 0 to 1990"),
        (["cat", None, "dog"] * 2, "has negative labels in test"),
    ],
)
def test_labels_of_a_table_are_checked_as_those_of_arrays(tmp_path, labels, sentence):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    encoded = table(datasets, 6)[0].cast_column("pic", datasets.Image(decode=False))
    one = datasets.Dataset.from_dict({"pic": encoded["pic"], "kind": labels})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match=sentence):
        opened("dataset=huggingface", f"dataset.name={tmp_path}", "dataset.test=test", "dataset.image=pic",
               "dataset.label=kind")  # fmt: skip


def test_a_table_names_no_file_elsewhere(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    picture(tmp_path / "secret.png")
    picture(tmp_path / "set/own.png")
    for name in ("secret", "set/own"):
        rows = [{"bytes": None, "path": str(tmp_path / f"{name}.png")}] * 4
        column = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
        column.to_parquet(str(tmp_path / "set/x.parquet"))
        words = [f"dataset.name={tmp_path}/set", "dataset.test=null", "dataset.label=null"]
        if name == "secret":
            with pytest.raises(UserError, match=r"names the file .*secret\.png, which lies elsewhere"):
                opened("dataset=huggingface", *words).train.load(torch.tensor([0]))
        else:
            assert opened("dataset=huggingface", *words).train.load(torch.tensor([0])).shape == (1, 3, 32, 32)


def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra hf")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cut\.parquet cannot be read by datasets") as raised:
        opened("dataset=huggingface", f"dataset.name={tmp_path}/cut.parquet")
    assert "\n" not in str(raised.value)
