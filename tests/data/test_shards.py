"""Shards: what is written is what is read, from a folder and from a store, ours and others'; the cache keeps bounds."""

import io
import json
import multiprocessing
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import stores
from support.tiny import composed, dataset

from icl_msr.cli import sharding
from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import RUNS, permutation
from icl_msr.data import stores as places
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.data.files import FileSplit
from icl_msr.data.stores import Cache, Entry, Store
from icl_msr.negatives.cached import texture_names
from icl_msr.training.datamodule import EpochBatches


def noise(path: Path, seed: int, size: tuple[int, int] = (20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def mask(path: Path, size: tuple[int, int] = (20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = np.zeros(size, np.uint8)
    shown[3 : 12 + len(path.stem), 5:17] = 1
    Image.fromarray(shown).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 training and 6 test images of two classes, some of them JPEG, with boxes and masks."""
    rows = ["split,class,file,xmin,ymin,xmax,ymax"]
    for part, count in (("train", 12), ("val", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                file = f"{part}/{name}/{i}.{'jpg' if i % 2 else 'png'}"
                noise(tmp_path / "folder" / file, 100 * (name == "dog") + i + 50 * (part == "val"))
                mask((tmp_path / "masks" / file).with_suffix(".png"))
                rows.append(f"{part},{name},{Path(file).name},{i % 4},2,15,{10 + i % 5}")
    (tmp_path / "folder/boxes.csv").write_text("\n".join(rows))
    return tmp_path / "folder"


def built(*words: str) -> Dataset:
    made: Dataset = build(check(composed(*words)).dataset)
    return made


def of_folder(root: Path, *words: str) -> Dataset:
    return built("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=16", *words)


def of_shards(url: object, *words: str) -> Dataset:
    return built("dataset=shards", f"dataset.url={url}", *words)


def write(data: Dataset, to: Path, images: int = 7, short_side: int | None = None) -> tuple[int, int]:
    return sharding.write(data, sharding.Options(str(to), images, short_side, 90), to)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same(one: Dataset, other: Dataset) -> None:
    """Check that two data sets show the same in every split."""
    assert (one.name, list(one.classes), one.image_size) == (other.name, list(other.classes), other.image_size)
    assert (one.mean, one.std, one.shifted, one.superclasses) == (
        other.mean,
        other.std,
        other.shifted,
        other.superclasses,
    )
    assert list(one.tests) == list(other.tests)
    assert one.trained_on() == other.trained_on()
    assert not one.classes or texture_names(one) == texture_names(other)
    pairs = [(one.train, other.train), *zip(one.tests.values(), other.tests.values(), strict=True)]
    pairs += [(one.balanced, other.balanced)] if one.balanced and other.balanced else []
    for mine, its in pairs:
        everything = torch.arange(len(mine))
        assert torch.equal(mine.labels, its.labels)
        assert torch.equal(mine.load(everything), its.load(everything))
        assert type(mine) is type(its)
        if isinstance(mine, ArraySplit):
            assert isinstance(its, ArraySplit)
            assert (mine.masks is None) == (its.masks is None)
            assert mine.masks is None or torch.equal(mine.masks, its.masks)


@pytest.mark.parametrize("resident_size", [0, 96])
@pytest.mark.parametrize("objects", ["", "dataset.boxes=boxes.csv", "dataset.masks={masks}"])
def test_shards_show_what_the_folder_shows(folder: Path, tmp_path: Path, objects: str, resident_size: int) -> None:
    words = [word.format(masks=tmp_path / "masks") for word in [objects] if word]
    resident = f"dataset.resident_size={resident_size}"
    assert write(of_folder(folder, *words, "dataset.resident_size=0"), tmp_path / "shards") == (5, 0)
    whole = of_folder(folder, *words, resident)
    same(of_shards(tmp_path / "shards", resident), whole)
    if objects:
        assert list(whole.tests) == ["full", "fg", "crop", "only_fg", "only_bg"]
        cut = [of_folder(folder, *words, resident, "dataset.train_on=fg")]
        same(of_shards(tmp_path / "shards", resident, "dataset.train_on=fg"), *cut)
    else:
        with pytest.raises(UserError, match=r"train_on=fg needs to know .* has no boxes or masks"):
            of_shards(tmp_path / "shards", "dataset.train_on=fg")


def test_every_kind_of_data_set_is_written(folder: Path, tmp_path: Path) -> None:
    unlabelled = ["dataset=images", f"dataset.root={folder}", "dataset.image_size=16", "dataset.resident_size=0"]
    np.savez(tmp_path / "a.npz", **arrays())
    for number, data in enumerate(
        [built(*unlabelled), dataset(), built("dataset=arrays", f"dataset.path={tmp_path}/a.npz")]
    ):
        to = tmp_path / f"shards-{number}"
        write(data, to, images=30)
        kept = ["dataset.resident_size=0"] if isinstance(data.train, FileSplit) else []
        same(of_shards(to, *kept), data)


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    masks = np.zeros((40, 16, 16), bool)
    masks[:, 2:9, 3:12] = True
    return {"images": images, "labels": np.arange(40) % 3, "is_train": np.arange(40) < 30, "masks": masks}


def test_files_are_copied_untouched_and_tars_are_those_of_webdataset(folder: Path, tmp_path: Path) -> None:
    write(of_folder(folder, "dataset.boxes=boxes.csv", "dataset.resident_size=0"), tmp_path / "shards", images=100)
    with tarfile.open(tmp_path / "shards/train-000000.tar") as tar:
        names = tar.getnames()
        assert names[:6] == [
            f"0000000{i}.{s}" for i, suffix in ((0, "png"), (1, "jpg")) for s in (suffix, "cls", "json")
        ]
        assert {member.mtime for member in tar} == {0}
        copied = tar.extractfile("00000001.jpg")
        assert copied is not None
        assert copied.read() == (folder / "train/cat/1.jpg").read_bytes()
        about = tar.extractfile("00000001.json")
        assert about is not None
        assert json.loads(about.read()) == {"box": [1, 2, 16, 12], "class": "cat", "file": "cat/1.jpg"}


def test_what_is_there_is_kept_and_what_differs_is_refused(folder: Path, tmp_path: Path) -> None:
    data, to = of_folder(folder, "dataset.resident_size=0"), tmp_path / "shards"
    write(data, to)
    whole = content(to)
    (to / "train-000001.tar").write_bytes(whole["train-000001.tar"][:-600])  # cut short
    (to / "train-000002.tar.index").unlink()
    (to / "train-000003.tar").unlink()
    (to / ".train-000003.tar.tmp").write_bytes(b"half")  # what a kill leaves
    assert write(data, to) == (3, 2)
    assert content(to) == whole
    with pytest.raises(UserError, match=r"holds shards that differ in images_per_shard; write these elsewhere, --to"):
        write(data, to, images=8)
    assert content(to) == whole


def test_an_unfinished_set_is_refused(folder: Path, tmp_path: Path) -> None:
    write(of_folder(folder, "dataset.resident_size=0"), tmp_path / "shards")
    (tmp_path / "shards/train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"train-000003\.tar cannot be read \(there is no such file\)"):
        of_shards(tmp_path / "shards")
    (tmp_path / "shards/shards.json").write_text("{}")
    with pytest.raises(UserError, match=r"shards\.json is damaged or of another version"):
        of_shards(tmp_path / "shards")


@pytest.mark.parametrize("objects", ["dataset.boxes=boxes.csv", "dataset.masks={masks}"])
def test_images_are_scaled_with_their_objects(folder: Path, tmp_path: Path, objects: str) -> None:
    word = objects.format(masks=tmp_path / "masks")
    write(of_folder(folder, word, "dataset.resident_size=0"), tmp_path / "shards", short_side=10)
    data = of_shards(tmp_path / "shards", "dataset.resident_size=0")
    split = data.tests["full"]
    assert isinstance(split, FileSplit)
    image = split.image(0)
    assert image.shape == (3, 10, 12)
    found = split.mask(0, image).nonzero()
    left, right = (5, 16) if "masks" in objects else (0, 15)
    assert abs(found[:, 1].min() - left / 2) <= 1
    assert abs(found[:, 1].max() - right / 2) <= 1


def foreign(to: Path, count: int = 10, labels: str = "number", name: str = "train-0.tar") -> None:
    """A tar as `tar` makes it from a folder, without an index of ours."""
    to.mkdir(exist_ok=True)
    with tarfile.open(to / name, "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(file, "PNG")
            for suffix, data in {
                "png": file.getvalue(),
                "cls": {"number": str(i % 3), "name": ["ape", "bee"][i % 2], "none": ""}[labels].encode(),
                "json": json.dumps({"kind": f"k{i % 4}"}).encode(),
            }.items():
                about = tarfile.TarInfo(f"some/folder/{i:03}.{suffix}")
                about.size, about.mtime = len(data), 1.5e9 + i
                tar.addfile(about, io.BytesIO(data))


def test_tars_of_others_are_indexed_once(tmp_path: Path) -> None:
    foreign(tmp_path / "tars")
    foreign(tmp_path / "tars", 4, name="val-0.tar")
    words = ["dataset.image_size=16"]
    data = of_shards(tmp_path / "tars", *words)
    assert (list(data.classes), len(data.train), len(data.tests["test"])) == (["0", "1", "2"], 10, 4)
    assert data.train.labels.tolist() == [i % 3 for i in range(10)]
    assert data.train.load(torch.arange(10))[:, 0, 0, 0].tolist() == list(range(10))
    index = tmp_path / "tars/train-0.tar.index"
    before = index.stat().st_mtime_ns
    of_shards(tmp_path / "tars", *words)
    assert index.stat().st_mtime_ns == before
    foreign(tmp_path / "tars", 9)  # the index fits no longer
    assert len(of_shards(tmp_path / "tars", *words).train) == 9
    labels = of_shards(
        tmp_path / "tars", *words, "dataset.label=json.kind", "dataset.classes=[k3,k2,k1,k0]"
    ).train.labels
    assert labels.tolist() == [3 - i % 4 for i in range(9)]


def test_labels_of_others_are_numbers_names_or_none(tmp_path: Path) -> None:
    for labels, classes in (("number", ["0", "1", "2"]), ("name", ["ape", "bee"]), ("none", [])):
        foreign(tmp_path / labels, labels=labels)
        data = of_shards(tmp_path / labels, "dataset.image_size=16")
        assert list(data.classes) == classes
        assert (len(data.train), len(data.tests["test"])) == (9, 1)
    foreign(tmp_path / "number", 4, "name", "train-1.tar")
    for words, sentence in (
        ([], "labels that are numbers and labels that are names; set dataset.label"),
        (["dataset.classes=[a,b]"], "has the label 2, which is not one of the 2 classes"),
        (["dataset.train=train-7*"], r"dataset\.train names no shard of .*, which has train-0\.tar, train-1\.tar"),
        (
            ["dataset.image=jpg", "dataset.train=train-0.tar"],
            r"some/folder/000 has no image jpg \(it has png, cls, json\)",
        ),
        (["dataset.mask=seg.png", "dataset.train=train-0.tar"], "has no member seg.png; set dataset.mask to another"),
        (["dataset.train='train-{0..2}.tar'"], r"train-2\.tar cannot be read \(there is no such file\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            of_shards(tmp_path / "number", "dataset.image_size=16", *words)
    with pytest.raises(UserError, match=r"dataset\.image_size has no value"):
        of_shards(tmp_path / "number")


def test_an_index_goes_to_the_cache_where_the_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "tars")

    def refuse(self: Store, name: str, data: bytes) -> None:
        if "cache" not in self.place:
            raise PermissionError(13, "read-only")
        save(self, name, data)

    save = Store.save
    monkeypatch.setattr(Store, "save", refuse)
    words = ["dataset.image_size=16", f"dataset.cache={tmp_path}/cache"]
    assert len(of_shards(tmp_path / "tars", *words).train) == 9
    assert [file.name for file in (tmp_path / "tars").iterdir()] == ["train-0.tar"]
    (kept,) = (tmp_path / "cache/shards").iterdir()
    before = kept.stat().st_mtime_ns
    of_shards(tmp_path / "tars", *words)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["link", "above", "cut", "text"])
def test_hostile_tars_are_refused_by_their_names(tmp_path: Path, kind: str) -> None:
    foreign(tmp_path / "tars")
    path = tmp_path / "tars/train-1.tar"
    with tarfile.open(path, "w") as tar:
        about = tarfile.TarInfo("../../x.png" if kind == "above" else "x.png")
        about.type, about.linkname = (tarfile.SYMTYPE, "/etc/passwd") if kind == "link" else (tarfile.REGTYPE, "")
        tar.addfile(about)
    if kind in ("cut", "text"):
        path.write_bytes(path.read_bytes()[:512] if kind == "cut" else b"hello" * 500)
    with pytest.raises(UserError, match=rf"^{path} (holds|is cut short|is not a tar).*; take it out of the set"):
        of_shards(tmp_path / "tars", "dataset.image_size=16")
    assert not (tmp_path / "tars/train-1.tar.index").exists()


def test_an_image_that_a_tar_has_damaged_is_refused_by_its_name(tmp_path: Path) -> None:
    foreign(tmp_path / "tars")
    with tarfile.open(tmp_path / "tars/train-1.tar", "w") as tar:
        about = tarfile.TarInfo("x.png")
        about.size = 5
        tar.addfile(about, io.BytesIO(b"hello"))
    with pytest.raises(UserError, match=r"train-1\.tar/x\.png is not an image of a known format"):
        of_shards(tmp_path / "tars", "dataset.image_size=16", "dataset.test=train-1.tar")


# The order


def test_blocks_mix_runs_of_neighbours() -> None:
    length, block = 100_000, 8 * RUNS
    order = permutation(3, 1, length, block)
    assert torch.equal(order.sort().values, torch.arange(length))
    for first in order.split(block)[:-2]:  # the last run may be shorter
        assert 100 < len((first // 8).unique()) <= RUNS + 2
    first = order[:block]
    assert first.min() < length / 20
    assert first.max() > length * 19 / 20
    assert (first[1:] - first[:-1]).abs().float().mean() > length / 4  # as images far apart in a whole permutation
    assert not torch.equal(order, permutation(3, 2, length, block))
    assert torch.equal(permutation(3, 1, 500, 500), permutation(3, 1, 500))


def test_two_ranks_see_blocks_as_one_does() -> None:
    one = EpochBatches(1030, 8, 1, block=4 * RUNS)
    assert torch.equal(torch.cat([batch.positions for batch in one]), permutation(1, 0, 1030, 4 * RUNS)[:1024])
    ranks = [EpochBatches(1030, 8, 1, rank, 2, block=4 * RUNS) for rank in range(2)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)


# Stores and the cache


class Remote(Store):
    """A store whose files lie in a folder, which counts what is fetched."""

    def __init__(self, folder: Path, cache: Cache | None) -> None:
        super().__init__(str(folder))
        self.remote, self.cache, self.fetched = True, cache, list[tuple[str, int, int]]()

    def _fetch(self, ranges):  # type: ignore[no-untyped-def]
        self.fetched += [(entry.name, start, end) for entry, start, end in ranges]
        return [Path(self.path(entry.name)).read_bytes()[start:end] for entry, start, end in ranges]

    def _connect(self):  # type: ignore[no-untyped-def]
        self._connection = self._connection or (os.getpid(), None, multiprocessing.Lock())
        return self._connection


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Remote, Entry, bytes]:
    monkeypatch.setattr(places, "PAGE", 100)
    data = np.random.default_rng(0).bytes(1050)
    (tmp_path / "a.tar").write_bytes(data)
    return Remote(tmp_path, Cache(tmp_path / "cache", 500)), Entry("a.tar", 1050, "1"), data


def test_ranges_come_from_pages_and_the_cache_keeps_its_bounds(
    remote: tuple[Remote, Entry, bytes], tmp_path: Path
) -> None:
    store, entry, data = remote
    for _ in range(2):
        for offset, length in ((0, 10), (95, 10), (250, 300), (1000, 50), (1049, 1), (3, 0), (100, 100)):
            assert store.read(entry, offset, length) == data[offset : offset + length]
            pages = list((tmp_path / "cache").iterdir())
            assert sum(page.stat().st_size for page in pages if page.name != "ledger") <= 500
            assert all(page.name == "ledger" or len(page.name) == 40 for page in pages)
    assert store.fetched[:3] == [("a.tar", 0, 100), ("a.tar", 100, 200), ("a.tar", 200, 300)]
    store.read(entry, 0, 10)
    before = len(store.fetched)
    store.read(entry, 0, 10)
    assert len(store.fetched) == before
    assert store.read(replace(entry, version="2"), 0, 10) == data[:10]  # a new version is fetched anew
    assert store.fetched[before:] == [("a.tar", 0, 100)]
    with pytest.raises(UserError, match=r"a\.tar is shorter than its index says"):
        store.read(entry, 1000, 51)


def test_damaged_pages_are_fetched_again_and_nothing_else_is_removed(
    remote: tuple[Remote, Entry, bytes], tmp_path: Path
) -> None:
    store, entry, data = remote
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/notes.txt").write_text("x" * 5000)
    store.read(entry, 0, 100)
    (page,) = [file for file in (tmp_path / "cache").iterdir() if len(file.name) == 40]
    page.write_bytes(b"cut")
    assert store.read(entry, 0, 100) == data[:100]
    for offset in range(0, 1000, 100):
        store.read(entry, offset, 100)
    assert (tmp_path / "cache/notes.txt").exists()


def test_a_batch_is_fetched_at_once_and_once(remote: tuple[Remote, Entry, bytes]) -> None:
    store, entry, data = remote
    store.prepare([(entry, 0, 10), (entry, 20, 10), (entry, 150, 20), (entry, 0, 0)])
    assert sorted(store.fetched) == [("a.tar", 0, 100), ("a.tar", 100, 200)]
    assert store.read(entry, 0, 200) == data[:200]
    store.prepare([(entry, 20, 10)])
    assert len(store.fetched) == 2


def read_much(store: Remote, entry: Entry, data: bytes, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(300):
        offset = int(random.integers(0, 1000))
        assert store.read(entry, offset, 50) == data[offset : offset + 50]


def test_processes_share_a_cache(remote: tuple[Remote, Entry, bytes], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_much, args=(*remote, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    sizes = [file.stat().st_size for file in (tmp_path / "cache").iterdir() if file.name != "ledger"]
    assert sum(sizes) <= 500


def test_urls_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it was not installed
    with pytest.raises(UserError, match=r"gs://a/b needs the package gcsfs; type pip install gcsfs\."):
        Store("gs://a/b")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://a/b needs the package s3fs; type pip install 'icl-msr\[shards\]'\."):
        Store("s3://a/b")
    with pytest.raises(UserError, match="ftp://a/b cannot be read; name a folder, or a URL of s3, gs, https"):
        Store("ftp://a/b")
    with pytest.raises(
        UserError, match=r"cannot be listed; name the shards, as in dataset\.train='train-\{0000..1023\}\.tar'"
    ):
        of_shards("https://127.0.0.1:1/x", "dataset.image_size=16", "dataset.train='*.tar'")


@pytest.mark.slow
def test_a_store_shows_what_the_folder_shows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stores.s3(monkeypatch) as bucket:
        data = of_folder(folder, "dataset.boxes=boxes.csv", "dataset.resident_size=0")
        options = sharding.Options(f"s3://{bucket}/set", 7, None, 90)
        (tmp_path / "staging").mkdir()
        assert sharding.write(data, options, tmp_path / "staging") == (5, 0)
        assert sharding.write(data, options, tmp_path / "staging") == (0, 5)
        for cache_gb in (1.0, 0.0):
            words = [f"dataset.cache={tmp_path}/cache", f"dataset.cache_gb={cache_gb}", "dataset.resident_size=0"]
            same(of_shards(options.to, *words), data)
        Store(options.to)._fs.chmod(options.to, "public-read", recursive=True)
        same(of_shards(f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/set", *words), data)
        foreign(tmp_path / "tars")
        Store(f"s3://{bucket}").save("tars/train-0.tar", tmp_path / "tars/train-0.tar")
        words = [f"dataset.cache={tmp_path}/cache", "dataset.image_size=16"]
        assert len(of_shards(f"s3://{bucket}/tars", *words).train) == 9
        assert "tars/train-0.tar.index" in [entry.name for entry in Store(f"s3://{bucket}").entries()]
        with pytest.raises(UserError, match=r"s3://.*/gone/\S* cannot be read|has no shards"):
            of_shards(f"s3://{bucket}/gone", *words)
        Store(options.to)._fs.rm(f"{options.to}/train-000001.tar")
        with pytest.raises(UserError, match=r"train-000001\.tar cannot be read \(there is no such file\)"):
            of_shards(options.to, *words)
