"""Arrays, torchvision's sets and folders of images, on small real files."""

import csv
import hashlib
import os
import pickle
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets
from torchvision.transforms.v2 import functional as TF

from icl_msr.core.errors import UserError
from icl_msr.data.arrays import arrays
from icl_msr.data.files import FileSplit
from icl_msr.data.folders import imagefolder
from icl_msr.data.sources import fit, read_image, statistics
from icl_msr.data.torchvision_sets import CIFAR100, cifar10, stl10

SHARED = Path(__file__).parents[2] / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- one image


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_every_kind_of_image_becomes_rgb(mode, kind):
    image = Image.fromarray(random_pixels(20, 30, 3)).convert(mode)
    try:
        data = encoded(image, kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    expected = np.array(Image.open(BytesIO(data)).convert("RGB"))
    assert np.array_equal(read_image(data, "x").permute(1, 2, 0), expected)


def test_sixteen_bits_keep_the_upper_eight():
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    image = read_image(encoded(Image.fromarray(values), "PNG"), "x")
    assert image.dtype == torch.uint8
    assert torch.equal(image[1], torch.from_numpy((values >> 8).astype(np.uint8)))


def test_a_flipped_bit_is_found_by_the_checksum():
    data = bytearray(encoded(Image.fromarray(random_pixels(32, 32, 3)), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(UserError, match=r"cat\.png cannot be read as an image"):
        read_image(bytes(data), "cat.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_a_truncated_image_is_named(tmp_path, kind):
    path = tmp_path / "cut.img"
    data = encoded(Image.fromarray(random_pixels(40, 40, 3)), kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.img"):
        read_image(path, str(path))


def test_text_empty_and_missing_files_are_named(tmp_path):
    for content in (b"hello", b""):
        (tmp_path / "no.png").write_bytes(content)
        with pytest.raises(UserError, match=r"no\.png"):
            read_image(tmp_path / "no.png", "no.png")
    with pytest.raises(UserError, match="gone"):
        read_image(tmp_path / "gone.png", "gone.png")


def test_fit_cuts_the_centre_square():
    image = torch.zeros(3, 8, 24, dtype=torch.uint8)
    image[:, :, 8:16] = 200
    assert (fit(image, 8) == 200).all()
    assert (fit(image, 4) == 200).float().mean() > 0.4
    assert fit(image, 4).shape == (3, 4, 4)


def test_statistics_are_those_of_all_pixels():
    images = torch.from_numpy(random_pixels(50, 3, 8, 8))
    mean, std = statistics(images)
    values = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean), values.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std), values.std((0, 2, 3), correction=0).float())


# ------------------------------------------------------------------------------------------------- arrays


def two_sets(**changes):
    content = {
        "train_images": random_pixels(12, 8, 8, 3),
        "train_labels": np.arange(12) % 3,
        "test_images": random_pixels(6, 8, 8, 3, seed=1),
        "test_labels": np.arange(6) % 3,
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def from_arrays(path, image_size=None, train_on="full", **content):
    np.savez(path, **content)
    return arrays(path=str(path), image_size=image_size, train_on=train_on)


@pytest.mark.parametrize("channels_first", [False, True])
def test_arrays_come_back_as_they_were(tmp_path, channels_first):
    content = two_sets(classes=np.array(["ant", "bee", "cat"]))
    stored = dict(content)
    if channels_first:
        for key in ("train_images", "test_images"):
            stored[key] = content[key].transpose(0, 3, 1, 2)
    data = from_arrays(tmp_path / "mine.npz", **stored)
    assert (data.name, list(data.classes), data.image_size, set(data.tests)) == (
        "mine",
        ["ant", "bee", "cat"],
        8,
        {"test"},
    )
    index = torch.tensor([3, 1])
    assert np.array_equal(data.train.load(index).permute(0, 2, 3, 1), content["train_images"][[3, 1]])
    assert np.array_equal(data.tests["test"].load(index).permute(0, 2, 3, 1), content["test_images"][[3, 1]])
    assert data.train.labels.tolist() == content["train_labels"].tolist()
    assert data.train.labels.dtype == torch.int64


def test_keys_may_be_shared_out_over_files(tmp_path):
    content = two_sets()
    paths = [tmp_path / "train.npz", tmp_path / "test.npz"]
    for path in paths:
        np.savez(path, **{key: value for key, value in content.items() if key.startswith(path.stem)})
    data = arrays(path=[str(path) for path in paths], image_size=None, train_on="full")
    assert (len(data.train), len(data.tests["test"])) == (12, 6)
    with pytest.raises(UserError, match="may stand once"):
        arrays(path=[str(paths[0]), str(paths[0])], image_size=None, train_on="full")


def test_one_set_is_divided_by_is_train(tmp_path):
    images = random_pixels(9, 8, 8, 3)
    is_train = np.arange(9) % 3 > 0
    data = from_arrays(tmp_path / "x.npz", images=images, labels=np.arange(9) % 2, is_train=is_train)
    assert np.array_equal(data.tests["test"].images.permute(0, 2, 3, 1), images[~is_train])
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1), images[is_train])


def test_compressed_images_in_one_array(tmp_path):
    images = random_pixels(9, 8, 8, 3)
    files = [encoded(Image.fromarray(image), "PNG") for image in images]
    content = {
        "blob": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.arange(9) % 2,
        "is_train": np.arange(9) < 6,
    }
    data = from_arrays(tmp_path / "x.npz", **content)
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1), images[:6])
    assert from_arrays(tmp_path / "x.npz", image_size=4, **content).train.images.shape == (6, 3, 4, 4)
    cut = content | {"offsets": content["offsets"] + 5}
    with pytest.raises(UserError, match="offsets"):
        from_arrays(tmp_path / "x.npz", **cut)
    broken = content | {"offsets": np.minimum(content["offsets"], content["offsets"][8] + 20)}
    with pytest.raises(UserError, match="Image 8"):
        from_arrays(tmp_path / "x.npz", **broken)


def test_masks_show_the_object_and_the_background(tmp_path):
    train_masks, test_masks = np.zeros((12, 8, 8), bool), np.zeros((6, 8, 8), np.uint8)
    train_masks[:, 2:6, 1:5] = True
    test_masks[:, 2:6, 1:5] = 255
    content = two_sets(train_masks=train_masks, test_masks=test_masks)
    data = from_arrays(tmp_path / "x.npz", train_on="fg", image_size=4, **content)
    assert set(data.tests) == {"full", "fg", "crop", "only_fg", "only_bg"}
    data = from_arrays(tmp_path / "x.npz", train_on="fg", **content)
    full, fg, only_fg, only_bg = (data.tests[key] for key in ("full", "fg", "only_fg", "only_bg"))
    inside = full.images[:, :, 2:6, 1:5]
    expected = torch.nn.functional.interpolate(inside.float(), size=(8, 8), mode="bilinear", antialias=True)
    assert (fg.images - expected).abs().max() <= 1
    assert torch.equal(only_fg.images + only_bg.images, full.images)
    assert torch.equal(only_fg.images[:, :, 2:6, 1:5], inside)
    assert only_bg.images[:, :, 2:6, 1:5].max() == 0
    assert torch.equal(full.masks, torch.from_numpy(test_masks > 0))
    trained = torch.from_numpy(content["train_images"]).permute(0, 3, 1, 2)[:, :, 2:6, 1:5].float()
    expected = torch.nn.functional.interpolate(trained, size=(8, 8), mode="bilinear", antialias=True)
    assert (data.train.images - expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": random_pixels(12, 8, 8, 3).astype(float)}, "uint8"),
        ({"train_images": random_pixels(12, 8, 8)}, r"\(N, H, W, 3\)"),
        ({"test_images": random_pixels(6, 8, 8, 4)}, r"\(N, H, W, 3\)"),
        ({"test_images": random_pixels(6, 10, 10, 3)}, "image_size"),
        ({"train_images": random_pixels(12, 8, 9, 3)}, "image_size"),
        ({"train_images": random_pixels(0, 8, 8, 3), "train_labels": np.arange(0)}, "no train images"),
        ({"train_labels": np.arange(11)}, r"integers \(12,\)"),
        ({"train_labels": np.arange(12) / 2}, "integers"),
        ({"test_labels": None}, "no array test_labels"),
        ({"train_images": None}, "train_images"),
        ({"classes": np.array(["a", "b"])}, "label 2 and only 2 classes"),
        ({"test_labels": np.arange(6) - 1}, "negative labels"),
        ({"test_masks": np.ones((6, 8, 7), bool)}, "test_masks"),
        ({"classes": np.array(["a", None])}, "pickles"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        from_arrays(tmp_path / "x.npz", **two_sets(**changes))
    assert "x.npz" in str(raised.value)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no file"):
        arrays(path=str(tmp_path / "gone.npz"), image_size=None, train_on="full")
    np.save(tmp_path / "x.npy", random_pixels(3, 8, 8, 3))
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "whole.npz", **two_sets())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    for name in ("x.npy", "text.npz", "cut.npz"):
        with pytest.raises(UserError, match=name):
            arrays(path=str(tmp_path / name), image_size=None, train_on="full")
    with pytest.raises(UserError, match="no masks"):
        from_arrays(tmp_path / "x.npz", train_on="fg", **two_sets())


# ------------------------------------------------------------------------------------------------- torchvision


def test_cifar10_of_torchvision(tmp_path, monkeypatch):
    kind = torchvision_datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    pixels = random_pixels(10, 3 * 32 * 32)
    md5 = write("data_batch_1", {"data": pixels, "labels": list(range(10))})
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", md5]])
    monkeypatch.setattr(
        kind, "test_list", [["test_batch", write("test_batch", {"data": pixels[:4], "labels": [3, 2, 1, 0]})]]
    )
    names = [f"class {k}" for k in range(10)]
    md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    data = cifar10(root=str(tmp_path), download=False, train_on="full")
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(10, 3, 32, 32))
    assert data.train.images.is_contiguous()
    assert data.tests["test"].labels.tolist() == [3, 2, 1, 0]
    assert (data.classes, data.image_size) == (names, 32)
    with pytest.raises(UserError, match="no masks"):
        cifar10(root=str(tmp_path), download=False, train_on="fg")


def test_cifar100_says_what_its_classes_are_of():
    superclass = {name: above for above, names in CIFAR100.items() for name in names.split()}
    assert len(CIFAR100) == 20
    assert len(superclass) == 100
    assert [len(names.split()) for names in CIFAR100.values()] == [5] * 20


def test_stl10_keeps_the_unlabelled_images(tmp_path, monkeypatch):
    kind = torchvision_datasets.STL10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = random_pixels(9, 3, 96, 96)
    labels = np.array([1, 10, 3], dtype=np.uint8)
    for name, content in (("train", pixels[:3]), ("unlabeled", pixels[3:]), ("test", pixels[:3])):
        content.transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        labels.tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {k}" for k in range(10)))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    data = stl10(root=str(tmp_path), download=False, image_size=96, train_on="full")
    assert torch.equal(data.train.images, torch.from_numpy(pixels))
    assert data.train.labels.tolist() == [0, 9, 2, -1, -1, -1, -1, -1, -1]
    assert data.tests["test"].labels.tolist() == [0, 9, 2]
    data = stl10(root=str(tmp_path), download=False, image_size=64, train_on="full")
    assert data.train.images.shape == (9, 3, 64, 64)
    assert data.labelled is None
    # W-MSE's protocol: classifiers see the centre of images of 70 pixels, and views are cut from whole ones.
    shown = stl10(root=str(tmp_path), download=False, image_size=64, train_on="full", resize=70)
    assert torch.equal(shown.train.images, data.train.images)
    assert shown.labelled is not None
    large = TF.resize(torch.from_numpy(pixels[:3]), [70], antialias=True)
    assert torch.equal(shown.labelled.train.images, large[:, :, 3:67, 3:67])
    assert torch.equal(shown.labelled.tests["test"].images, large[:, :, 3:67, 3:67])
    assert shown.labelled.train.labels.tolist() == [0, 9, 2]
    assert (shown.labelled.mean, shown.labelled.std) == (shown.mean, shown.std)
    with pytest.raises(UserError, match=r"dataset\.resize=60 is smaller than dataset\.image_size=64"):
        stl10(root=str(tmp_path), download=False, image_size=64, train_on="full", resize=60)


def test_missing_torchvision_sets_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"dataset\.download=true"):
        cifar10(root=str(tmp_path), download=False, train_on="full")
    monkeypatch.setattr(
        torchvision_datasets.CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(UserError, match=r"no route.*unpack it so that .*cifar-10-batches-py exists"):
        cifar10(root=str(tmp_path), download=True, train_on="full")


# ------------------------------------------------------------------------------------------------- folders


def make_folder(root, counts, size=(32, 32), suffix=".png"):
    """Images of one random colour pattern each: {"train/cat": 3} makes three."""
    for k, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random_pixels(*size, 3, seed=1000 * k + i)).save(root / folder / f"{i}{suffix}")
    return root


def from_folder(root, **changes):
    keys = {
        "train": None,
        "tests": None,
        "split": 0.25,
        "boxes": None,
        "masks": None,
        "image_size": 32,
        "train_on": "full",
        "resident_size": 96,
        "memory_budget_gb": 1.0,
        "shifted": {},
        "renamed": {},
    }
    return imagefolder(root=str(root), **(keys | changes))


def test_arrays_that_need_more_memory_than_there_is(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:  # one file that says of itself that it has 2 ** 50 bytes
        archive.writestr("train_images.npy", b"x")
        archive.infolist()[0].file_size = 2**50
    with pytest.raises(UserError, match=r"The arrays of .*x\.npz would need .* GB of memory, and this machine has"):
        arrays(path=str(path), image_size=None, train_on="full")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d, 8, 8, 3), }"
    for shape, padding in ((10**15, 0), (3, 70_000)):
        text = (header % shape).ljust(200 + padding) + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            version, length = (b"\x02\x00", len(text).to_bytes(4, "little"))
            archive.writestr("train_images.npy", b"\x93NUMPY" + version + length + text + bytes(576))
        with pytest.raises(UserError, match=r"x\.npz cannot be read as \.npz without pickles") as raised:
            arrays(path=str(path), image_size=None, train_on="full")
        assert "\n" not in str(raised.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"There is no file .*x\.npz"):
        arrays(path=str(path), image_size=None, train_on="full")


@pytest.mark.parametrize("test", ["val", "test"])
def test_train_and_test_folders(tmp_path, test):
    make_folder(tmp_path, {"train/cat": 3, "train/dog": 2, f"{test}/cat": 1, f"{test}/dog": 2})
    data = from_folder(tmp_path)
    assert (list(data.classes), set(data.tests)) == (["cat", "dog"], {"test"})
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.tests["test"].labels.tolist() == [0, 1, 1]
    expected = np.array(Image.open(tmp_path / "train/dog/1.png"))
    assert np.array_equal(data.train.load(torch.tensor([4]))[0].permute(1, 2, 0), expected)


def test_one_folder_holds_out_the_same_part_of_every_class(tmp_path):
    make_folder(tmp_path, {"cat": 8, "dog": 4})
    first, second = from_folder(tmp_path), from_folder(tmp_path)
    assert first.tests["test"].labels.tolist() == [0, 0, 1]
    assert len(first.train) == 9
    assert torch.equal(first.tests["test"].images, second.tests["test"].images)
    together = torch.cat([first.train.images, first.tests["test"].images]).flatten(1)
    assert len(together.unique(dim=0)) == 12


def test_named_folders_are_test_sets_of_their_own(tmp_path):
    make_folder(tmp_path, {f"{domain}/{name}": 2 for domain in ("photo", "cartoon", "sketch") for name in "ab"})
    data = from_folder(tmp_path, train="photo", tests=["cartoon", "sketch"])
    assert set(data.tests) == {"cartoon", "sketch"}
    assert (len(data.train), len(data.tests["sketch"])) == (4, 4)


@pytest.mark.parametrize("resident_size", [96, 0])
def test_shifted_folders_are_matched_by_name(tmp_path, resident_size):
    make_folder(tmp_path / "photos", {"train/cat": 4, "train/dog": 4, "train/eel": 4, "val/cat": 2, "val/dog": 1})
    make_folder(tmp_path / "sketches", {"dog": 3, "hound": 2, "unicorn": 5})
    make_folder(tmp_path / "again", {"0": 1, "2": 2, "1": 3})
    shifted = {"sketch": str(tmp_path / "sketches"), "v2": "../again"}
    data = from_folder(tmp_path / "photos", shifted=shifted, renamed={"hound": "dog"}, resident_size=resident_size)
    assert list(data.tests) == ["test", "sketch", "v2"]
    assert data.shifted == ("sketch", "v2")
    assert data.tests["sketch"].labels.tolist() == [1] * 5
    assert data.tests["v2"].labels.tolist() == [0, 1, 1, 1, 2, 2]
    image = np.array(Image.open(tmp_path / "sketches/hound/1.png"))
    assert torch.equal(data.tests["sketch"].load(torch.tensor([4]))[0], torch.from_numpy(image).permute(2, 0, 1))


def test_numbered_folders_count_the_classes_wherever_they_begin(tmp_path):
    make_folder(tmp_path / "photos", {"train/cat": 4, "train/dog": 4, "val/cat": 1})
    make_folder(tmp_path / "again", {"1": 2, "2": 1})
    data = from_folder(tmp_path / "photos", shifted={"v2": "../again"})
    assert data.tests["v2"].labels.tolist() == [0, 0, 1]


def test_shifted_folders_that_do_not_fit(tmp_path):
    make_folder(tmp_path / "photos", {"train/cat": 4, "train/dog": 4, "val/cat": 1})
    make_folder(tmp_path / "cars", {"car": 3})
    make_folder(tmp_path / "many", {"0": 1, "1": 1, "2": 1})
    for shifted, renamed, words in (
        ({"a": "nowhere"}, {}, "There is no folder .*nowhere; set dataset.shifted.a"),
        ({"a": "../cars"}, {}, "no images of a class of the training folder, cat, dog"),
        ({"a": "../cars"}, {"car": "cot"}, "dataset.renamed leads to cot.*cat"),
        ({"a": "../many"}, {}, "3 numbered classes and the training folder 2"),
        ({"test": "../cars"}, {"car": "cat"}, "dataset.shifted.test is a test split already"),
    ):
        with pytest.raises(UserError, match=words):
            from_folder(tmp_path / "photos", shifted=shifted, renamed=renamed)


@pytest.mark.parametrize("resident_size", [96, 0])
def test_boxes_show_the_object_and_the_background(tmp_path, resident_size):
    make_folder(tmp_path, {"train/cat": 2, "val/cat": 2}, size=(32, 48))
    with (tmp_path / "boxes.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["split", "wnid", "file", "xmin", "ymin", "xmax", "ymax"])
        for split in ("train", "val"):
            for i in range(2):
                rows.writerow([split, "cat", f"{i}.png", 16, 8, 31, 23])
    data = from_folder(tmp_path, boxes="boxes.csv", train_on="fg", resident_size=resident_size)
    assert isinstance(data.train, FileSplit) == (resident_size == 0)
    assert list(data.tests) == ["full", "fg", "crop", "only_fg", "only_bg"]
    shown = {key: split.load(torch.arange(2)) for key, split in data.tests.items()}
    whole = torch.from_numpy(np.array(Image.open(tmp_path / "val/cat/0.png"))).permute(2, 0, 1)
    assert torch.equal(shown["full"][0], whole[:, :, 8:40])
    inside = whole[None, :, 8:24, 16:32].float()
    expected = torch.nn.functional.interpolate(inside, size=(32, 32), mode="bilinear", antialias=True)
    assert (shown["fg"][:1] - expected).abs().max() <= 1
    assert torch.equal(shown["only_fg"] + shown["only_bg"], shown["full"])
    assert torch.equal(shown["only_fg"][0, :, 8:24, 8:24], whole[:, 8:24, 16:32])
    assert shown["only_bg"][:, :, 8:24, 8:24].max() == 0
    places = [whole[None, :, y : y + 16, x : x + 16].float() for y in range(17) for x in range(33)]
    crops = torch.cat(
        [torch.nn.functional.interpolate(p, size=(32, 32), mode="bilinear", antialias=True) for p in places]
    )
    assert ((shown["crop"][0] - crops).abs().flatten(1).amax(1) <= 1).sum() == 1
    if resident_size:
        mask = data.tests["full"].masks[0]
        assert mask.sum() == 16 * 16
        assert mask[8:24, 8:24].all()


def test_masks_equal_the_boxes_they_fill(tmp_path):
    make_folder(tmp_path / "a", {"cat": 4})
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:12] = 1
    (tmp_path / "a/masks/cat").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(mask).save(tmp_path / f"a/masks/cat/{i}.png")
    lines = "\n".join(f"cat,{i}.png,4,8,11,23" for i in range(4))
    (tmp_path / "a/boxes.csv").write_text("class,file,xmin,ymin,xmax,ymax\n" + lines)
    by_mask = from_folder(tmp_path / "a", masks="masks", train_on="fg")
    (tmp_path / "a/masks").rename(tmp_path / "masks")
    by_box = from_folder(tmp_path / "a", boxes="boxes.csv", train_on="fg")
    assert torch.equal(by_mask.train.images, by_box.train.images)
    for key in by_box.tests:
        assert torch.equal(by_mask.tests[key].images, by_box.tests[key].images)
    assert list(by_mask.classes) == ["cat"]


def test_larger_images_and_small_budgets_stay_files(tmp_path):
    make_folder(tmp_path, {"cat": 4})
    assert isinstance(from_folder(tmp_path, memory_budget_gb=1e-6).train, FileSplit)
    assert isinstance(from_folder(tmp_path, image_size=128).train, FileSplit)
    assert not isinstance(from_folder(tmp_path).train, FileSplit)


def test_wrong_folders_are_refused(tmp_path):
    root = make_folder(tmp_path / "x", {"train/cat": 2, "train/dog": 2, "val/cat": 2})

    def refused(message, where=root, **changes):
        with pytest.raises(UserError, match=message):
            from_folder(where, **changes)

    refused("no folder", where=tmp_path / "gone")
    refused("no class folders", where=root / "train/cat")
    refused("no folder", tests=["gone"])
    refused(r"dataset\.boxes or dataset\.masks", train_on="fg")
    refused("no file", boxes="gone.csv")
    refused("no folder", masks="gone")
    refused("has no mask", masks="train")
    (root / "boxes.csv").write_text("file,xmin,ymin,xmax,ymax\n")
    refused("lacks the columns class", boxes="boxes.csv")
    (root / "boxes.csv").write_text("class,file,xmin,ymin,xmax,ymax\ncat,0.png,5,5,4,9\n")
    refused("Line 2", boxes="boxes.csv")
    (root / "boxes.csv").write_text("class,file,xmin,ymin,xmax,ymax\ncat,0.png,5,5,9,nine\n")
    refused("Line 2", boxes="boxes.csv")
    (root / "boxes.csv").write_text("class,file,xmin,ymin,xmax,ymax\ncat,0.png,5,5,9,9\n")
    refused("no box for .*1.png", boxes="boxes.csv")
    (root / "boxes.csv").write_text(
        "class,file,xmin,ymin,xmax,ymax\n"
        + "".join(f"{c},{i}.png,50,50,60,60\n" for c in ("cat", "dog") for i in (0, 1))
    )
    refused("outside", boxes="boxes.csv")
    make_folder(root, {"val/horse": 1})
    refused("horse is not a class")
    (root / "train/bird").mkdir()
    refused("bird has no images")
    refused("too few", where=make_folder(tmp_path / "y", {"cat": 1}))
    make_folder(tmp_path / "z", {"cat": 4})
    data = (tmp_path / "z/cat/2.png").read_bytes()
    (tmp_path / "z/cat/2.png").write_bytes(data[:100])
    refused(r"cat/2\.png", where=tmp_path / "z")


# ------------------------------------------------------------------------------------------------- real data


@needs_shared
@pytest.mark.slow
def test_tiny_imagenet_boxes(tmp_path):
    with zipfile.ZipFile(SHARED / "tiny_imagenet_100a.zip") as archive:
        names = archive.namelist()
        classes = sorted({name.split("/")[2] for name in names if "/train/" in name})[:3]
        archive.extractall(
            tmp_path, [n for n in names if n.endswith("boxes.csv") or any(f"/{c}/" in n for c in classes)]
        )
    data = from_folder(tmp_path / "tiny-imagenet-100a", boxes="boxes.csv", image_size=64, train_on="fg")
    assert (len(data.train), [len(split) for split in data.tests.values()]) == (600, [150] * 4)
    masks = data.tests["full"].masks
    assert 0.1 < masks.float().mean() < 0.9
    assert torch.equal(data.tests["only_fg"].images > 0, (data.tests["full"].images > 0) & masks[:, None])


@needs_shared
@pytest.mark.slow
def test_cifar10_compressed_in_one_array():
    data = arrays(path=str(SHARED / "cifar10_jpeg75.npz"), image_size=None, train_on="full")
    assert (len(data.train), len(data.tests["test"]), data.image_size) == (50_000, 10_000, 32)
    assert data.classes[0] == "airplane"
    assert torch.allclose(torch.tensor(data.mean), torch.tensor([0.491, 0.482, 0.447]), atol=0.003)


@needs_shared
@pytest.mark.slow
def test_layouts_of_bar_and_pacs(tmp_path):
    for name in ("bar_biased_action", "pacs_photo_cartoon_sketch"):
        with zipfile.ZipFile(SHARED / f"{name}.zip") as archive:
            archive.extractall(tmp_path)
    bar = from_folder(tmp_path / "bar")
    assert (len(bar.train), len(bar.tests["test"]), len(bar.classes)) == (1941, 329, 6)
    pacs = from_folder(tmp_path / "pacs", train="photo", tests=["cartoon", "sketch"])
    assert (len(pacs.train), len(pacs.tests["cartoon"]), len(pacs.tests["sketch"])) == (1670, 2344, 3929)
    photo = from_folder(tmp_path / "pacs/photo")
    assert len(photo.train) + len(photo.tests["test"]) == 1670


def test_photographs_are_resized_before_the_centre_is_cut(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(random_pixels(50, 60, 3, seed=i)).save(tmp_path / name / f"{i}.png")
    words = {"train": None, "tests": None, "split": 0.5, "boxes": None, "masks": None, "train_on": "full"}
    words |= {"memory_budget_gb": 1.0, "shifted": {}, "renamed": {}, "image_size": 32, "root": str(tmp_path)}
    data = imagefolder(**words, resident_size=0, resize=40)
    for split in (data.train, data.tests["test"]):
        whole = split.image(0)
        assert whole.shape == (3, 50, 60)  # views are cut from the whole image
        expected = TF.center_crop(TF.resize(whole, [40], antialias=True), [32, 32])
        assert torch.equal(split.load(torch.tensor([0]))[0], expected)
    plain = imagefolder(**words, resident_size=0)
    assert plain.train.identity() != data.train.identity()
    with pytest.raises(UserError, match=r"dataset\.resize is for photographs .* dataset\.resident_size=0"):
        imagefolder(**words, resident_size=96, resize=40)
