"""Data sets in shards: WebDataset tars in a folder or a store, read by range."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.storage import expanded
from icl_msr.data import tars
from icl_msr.data.classes import listed_classes
from icl_msr.data.dataset import ArraySplit, Dataset, Split, numbered_classes
from icl_msr.data.files import FileSplit, of_files, of_shown
from icl_msr.data.listing import SUFFIXES, is_number
from icl_msr.data.sources import LARGEST, MaskValues, Region, TrainOn, cores, progress_bar
from icl_msr.data.stores import Cache, Entry, Store
from icl_msr.data.unlabelled import labelled_set

MANIFEST = "shards.json"
"""The file of a folder of our shards that says what the data set is."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]


class Stored(BaseModel):
    """A split in shards."""

    model_config = ConfigDict(extra="forbid")

    images: PositiveInt
    objects: Literal["boxes", "masks"] | None
    mask_values: MaskValues


class Manifest(BaseModel):
    """What a folder of our shards holds."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["icl-msr shards 1"]
    name: str
    classes: list[str]
    superclasses: list[str] | None
    image_size: PositiveInt
    colours: tuple[tuple[float, float, float], tuple[float, float, float]] | None
    """Channel means and standard deviations; None takes those of the images."""
    images_per_shard: PositiveInt
    short_side: PositiveInt | None
    quality: PositiveInt
    content: dict[str, Any]
    """What identifies the images; see `Dataset.trained_on`."""
    splits: dict[Name, Stored]
    tests: dict[str, tuple[Name, Region]]
    """The stored split and the region of each test split."""
    balanced: Name | None
    shifted: list[str]

    def shards(self, split: str) -> list[str]:
        """Return the names of the shards of a split, in order."""
        return [f"{split}-{k:06d}.tar" for k in range(-(-self.splits[split].images // self.images_per_shard))]


def shards(
    *,
    url: str,
    train: str | list[str] | None,
    test: str | list[str] | None,
    image: str | None,
    label: str,
    mask: str | None,
    mask_values: MaskValues,
    classes: str | list[str] | None,
    split: Annotated[float, Field(gt=0, lt=1)],
    labelled: str | dict[str, Any] | None,
    image_size: PositiveInt | None,
    train_on: TrainOn,
    resident_size: NonNegativeInt,
    memory_budget_gb: NonNegativeFloat,
    cache: str,
    cache_gb: NonNegativeFloat,
    options: dict[str, Any],
) -> Dataset:
    """Build a data set from WebDataset tars, those of `python -m icl_msr.shards` or any others.

    Every sample is read by its range. Where a tar has no index, one is made once, beside the tar if that can be
    written, and else in the cache.

    Args:
        url: a folder, or `s3://`, `gs://`, `https://` or `hf://`. Stores need the extra `shards`. Access keys come from
            where the tools of each store look for them, such as AWS_PROFILE.
        train: the shards to train on, a name in `url` with `*` or `{000..127}`, or a list. Null takes what
            `icl_msr.shards` wrote, or else the names that begin with `train`, or else all. The remaining keys down to
            `split` are for shards that it did not write.
        test: the shards to test on. Null takes the names that begin with `val` or `test`, or else holds out a part.
        image: suffix of the image's member. Null takes the first one that is a suffix of images.
        label: suffix of the member with the label, a number or a name; `json.<key>` reads a key of a JSON member.
            Samples that lack it have no label.
        mask: suffix of the member with a mask of the object. Null has no masks.
        mask_values: see `imagefolder`.
        classes: names of labels that are numbers, as in `imagefolder`.
        split: the fraction of the images that is held out if there are no test shards. It is always the same images.
        labelled: see `unlabelled.images`.
        image_size: length of the short side, in pixels. Null takes that of the set that was written.
        train_on: `full` images, or `fg`, the inside of the object's box stretched to a square.
        resident_size: see `imagefolder`.
        memory_budget_gb: see `imagefolder`.
        cache: folder for what is kept of remote shards.
        cache_gb: the most that is kept, in gigabytes. 0 keeps nothing and reads each image by its exact range.
        options: further arguments of the file system of `fsspec`, such as `{anon: true}`. They are saved with the run.

    Raises:
        UserError: a shard is missing, damaged or holds links, or labels and classes do not fit together.
    """
    limit, pages = int(cache_gb * 1e9), expanded(cache) / "shards"
    store = Store(url, options, Cache(pages, limit) if limit else None)
    reader = _Reader(store, pages)
    manifest = reader.manifest() if train is None and test is None else None
    budget = _Budget(resident_size, memory_budget_gb)
    if manifest is not None:
        data = _ours(reader, manifest, image_size or manifest.image_size, train_on, budget)
    else:
        size = _required(image_size)
        choice = _Choice(image, label, mask, mask_values, size)
        data = _foreign(reader, _names(store, train, test), choice, classes, split, train_on, labelled is None, budget)
    if store.remote and limit < reader.bytes:
        note = f"{url} needs {reader.bytes / 1e9:.3g} GB and dataset.cache_gb is {cache_gb:g}: a larger cache, or "
        data.notes = (*data.notes, note + "loader.block=16384, fetches most of it once in an epoch.")
    if labelled is not None:
        data.labelled = replace(labelled_set(labelled, data.image_size), mean=data.mean, std=data.std)
    return data


@dataclass
class Members:
    """The content of one member of each of some samples, read by range."""

    store: Store
    shards: Sequence[Entry]
    shard: Tensor
    """The shard of each member, (N,) int64."""
    offset: Tensor
    """The first byte of each, (N,) int64."""
    length: Tensor
    """The bytes of each, (N,) int64."""

    def __getitem__(self, index: int, /) -> bytes:
        return self.store.read(*self._range(index))

    def prepare(self, index: Tensor) -> None:
        """Fetch the members at `index` (n,) together."""
        if self.store.remote:
            self.store.prepare([self._range(i) for i in index.tolist()])

    def identity(self) -> str:
        """Return a text that is equal for the same members in the same order."""
        places = torch.stack([self.shard, self.offset, self.length]).numpy().tobytes()
        return f"{self.store.place} {self.shards} {sha256(places).hexdigest()}"

    def _range(self, i: int) -> tuple[Entry, int, int]:
        return self.shards[int(self.shard[i])], int(self.offset[i]), int(self.length[i])


@dataclass
class _Choice:
    """The suffixes of a sample's members, and how they are read."""

    image: str | None
    label: str
    mask: str | None
    mask_values: MaskValues
    image_size: int


@dataclass
class _Budget:
    """What may be decoded once and kept; see `imagefolder`."""

    resident_size: int
    memory_budget_gb: float


class _Reader:
    """Reads indices of shards, and makes those that are missing."""

    def __init__(self, store: Store, cache: Path) -> None:
        self.store, self.cache, self.bytes = store, cache, 0

    def manifest(self) -> Manifest | None:
        """Return what our shards hold; None if others wrote the shards."""
        content = self.store.load(MANIFEST, tars.LARGEST_INDEX)
        if content is None:
            return None
        try:
            return Manifest.model_validate_json(content)
        except ValidationError:
            raise UserError(
                f"{self.store.path(MANIFEST)} is damaged or of another version; write the shards anew, or name them "
                "with dataset.train and dataset.test."
            ) from None

    def samples(self, entries: Sequence[Entry]) -> list[list[tars.Sample]]:
        """Return the samples of each shard. Show a progress bar after 2 s."""
        self.bytes += sum(entry.size for entry in entries)
        began, found = time.monotonic(), list[list[tars.Sample]]()
        bar = progress_bar("shards")
        task = bar.add_task("Reading indices", total=len(entries))
        with ThreadPoolExecutor(max(8, cores())) as pool, ExitStack() as shown:
            for samples in pool.map(self._index, entries):
                found.append(samples)
                bar.update(task, advance=1)
                if not bar.live.is_started and time.monotonic() - began > 2:
                    shown.enter_context(bar)
        return found

    def _index(self, entry: Entry) -> list[tars.Sample]:
        beside = entry.name + tars.SUFFIX
        kept = Store(str(self.cache))
        name = f"{sha256(f'{self.store.path(entry.name)} {entry.version}'.encode()).hexdigest()[:40]}{tars.SUFFIX}"
        for place, file in ((self.store, beside), (kept, name)):
            content = place.load(file, tars.LARGEST_INDEX)
            samples = None if content is None else tars.parse(content, entry.size)
            if samples is not None:
                return samples
        content = tars.scan(lambda at, n: self._some(entry, at, n), entry.size, self.store.path(entry.name))
        self._keep(content, beside, kept, name)
        samples = tars.parse(content, entry.size)
        assert samples is not None
        return samples

    def _some(self, entry: Entry, offset: int, length: int) -> bytes:
        return self.store.read(entry, offset, max(0, min(length, entry.size - offset)))

    def _keep(self, content: bytes, beside: str, kept: Store, name: str) -> None:
        if not self.store.place.startswith(("http", "hf")):
            try:
                return self.store.save(beside, content)
            except Exception:  # a store can raise almost anything where it may not be written
                pass
        try:
            kept.save(name, content)
        except OSError as error:
            raise UserError(
                f"The cache {self.cache} cannot be written ({error.strerror}); set dataset.cache to another folder."
            ) from None


def _ours(
    reader: _Reader,
    manifest: Manifest,
    image_size: int,
    train_on: TrainOn,
    budget: _Budget,
) -> Dataset:
    """Return the data set that was written."""
    entries = {
        entry.name: entry
        for entry in reader.store.entries([n for split in manifest.splits for n in manifest.shards(split)])
    }
    splits = {}
    for name, stored in manifest.splits.items():
        own = [entries[shard] for shard in manifest.shards(name)]
        choice = _Choice(None, "cls", "mask" if stored.objects == "masks" else None, stored.mask_values, image_size)
        splits[name] = _split(reader, own, choice, manifest.classes, boxes=stored.objects == "boxes")
        if len(splits[name]) != stored.images:
            raise UserError(
                f"{reader.store.place} has {len(splits[name])} images in {name} of {stored.images}; repeat the command "
                "that wrote the shards."
            )
    if train_on == "fg" and not splits["train"].located:
        raise UserError(
            f"dataset.train_on=fg needs to know where the object is, and {reader.store.place} has no boxes or masks "
            "for its training images; use dataset.train_on=full."
        )
    data = of_shown(
        manifest.name,
        manifest.classes,
        replace(splits["train"], region=train_on),
        {test: replace(splits[name], region=region) for test, (name, region) in manifest.tests.items()},
        resident_size=budget.resident_size,
        memory_budget_gb=budget.memory_budget_gb,
        shifted=manifest.shifted,
    )
    if manifest.balanced is not None:
        balanced: Split = splits[manifest.balanced]
        data.balanced = splits[manifest.balanced].in_memory() if isinstance(data.train, ArraySplit) else balanced
    if manifest.colours is not None:  # it was written from arrays, whose images have no files
        data.mean, data.std = manifest.colours
        if isinstance(data.train, ArraySplit):
            data.train.files = None
    data.superclasses = manifest.superclasses
    return data


def _foreign(
    reader: _Reader,
    shards: Mapping[str, list[Entry]],
    choice: _Choice,
    classes: str | list[str] | None,
    held_out: float,
    train_on: TrainOn,
    tested: bool,
    budget: _Budget,
) -> Dataset:
    """Return a data set of shards that others wrote. Without `tested`, another data set is tested on."""
    base = Path(".") if reader.store.remote else Path(reader.store.place)
    names = listed_classes(classes, base)
    samples = {part: reader.samples(entries) for part, entries in shards.items()}
    if names is None:
        names = _classes(reader, shards, samples, choice)
    splits = {part: _split(reader, shards[part], choice, names, samples=samples[part]) for part in shards}
    tests = {"test": splits["test"]} if "test" in splits else {}
    train = splits["train"]
    if not tests and tested:
        train, tests["test"] = train.divided(held_out)
    if train_on == "fg" and not train.located:
        raise UserError(
            "dataset.train_on=fg needs to know where the object is; set dataset.mask, or dataset.train_on=full."
        )
    name = re.sub(r"\W+", "-", reader.store.place.rpartition("/")[2]) or "shards"
    return of_files(
        name,
        names,
        train,
        tests,
        train_on,
        resident_size=budget.resident_size,
        memory_budget_gb=budget.memory_budget_gb,
    )


def _split(
    reader: _Reader,
    entries: Sequence[Entry],
    choice: _Choice,
    classes: Sequence[str],
    *,
    boxes: bool = False,
    samples: list[list[tars.Sample]] | None = None,
) -> FileSplit:
    """Return the samples of some shards, in the order of their names."""
    files, labels, places, masks, around = (
        list[str](),
        list[int](),
        list[tuple[int, ...]](),
        list[tuple[int, ...]](),
        [],
    )
    number = {name: k for k, name in enumerate(classes)}
    mask_files: list[str] = []
    for shard, found in enumerate(reader.samples(entries) if samples is None else samples):
        where = reader.store.path(entries[shard].name)
        for sample in found:
            suffix = _suffix_of(sample, choice.image, f"{where}: {sample.key}")
            about = _json(sample)
            file = about.get("file")
            files.append(f"{where}/{file if isinstance(file, str) and _inside(file) else f'{sample.key}.{suffix}'}")
            places.append((shard, *sample.members[suffix]))
            labels.append(_label(sample, choice.label, number, f"{where}: {sample.key}"))
            if boxes:
                around.append(_box(about, f"{where}: {sample.key}"))
            if choice.mask is not None:
                suffix = next((s for s in sample.members if s == choice.mask or s.startswith(f"{choice.mask}.")), "")
                if not suffix:
                    raise UserError(
                        f"{where}: {sample.key} has no member {choice.mask}; set dataset.mask to another, or to null."
                    )
                masks.append((shard, *sample.members[suffix]))
                mask_files.append(f"{where}/{sample.key}.{suffix}")
    if not files:
        raise UserError(
            f"{reader.store.place} has no images in {', '.join(entry.name for entry in entries) or 'any shard'}."
        )
    return FileSplit(
        files,
        torch.tensor(labels),
        choice.image_size,
        torch.tensor(around) if boxes else None,
        mask_files if masks else None,
        mask_values=choice.mask_values,
        encoded=_encoded(reader.store, entries, places),
        encoded_masks=_encoded(reader.store, entries, masks) if masks else None,
    )


def _encoded(store: Store, entries: Sequence[Entry], places: list[tuple[int, ...]]) -> Members:
    return Members(store, tuple(entries), *torch.tensor(places).T.contiguous())


def _suffix_of(sample: tars.Sample, wanted: str | None, where: str) -> str:
    """Return the suffix of the image of a sample."""
    suffix = wanted or next((s for s in sample.members if f".{s}" in SUFFIXES), None)
    if suffix not in sample.members:
        there = ", ".join(sample.members)
        raise UserError(
            f"{where} has no image {suffix or ''} (it has {there}); set dataset.image to the suffix of images."
        )
    if sample.members[suffix][1] > LARGEST:
        raise UserError(f"{where}.{suffix} is larger than {LARGEST / 1e6:g} MB, as no such file is; take it out.")
    return suffix


def _json(sample: tars.Sample) -> dict[str, Any]:
    try:
        about = json.loads(sample.texts.get("json", "{}"))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/") and name.isprintable() and len(name) <= 1024


def _text(sample: tars.Sample, label: str) -> str | int | None:
    """Return the label of a sample as it stands in the tar; None if it has none."""
    if label.startswith("json."):
        value = _json(sample).get(label.removeprefix("json."))
        return value if isinstance(value, str | int) and not isinstance(value, bool) else None
    text = sample.texts.get(label, "").strip()
    return int(text) if is_number(text.removeprefix("-")) else text or None


def _label(sample: tars.Sample, label: str, number: Mapping[str, int], where: str) -> int:
    value = _text(sample, label)
    known = -1 if value is None or not number else number.get(value, len(number)) if isinstance(value, str) else value
    if not -1 <= known < max(1, len(number)):
        raise UserError(
            f"{where} has the label {value}, which is not one of the {len(number)} classes; correct dataset.classes."
        )
    return known


def _classes(
    reader: _Reader, shards: Mapping[str, list[Entry]], samples: Mapping[str, list[list[tars.Sample]]], choice: _Choice
) -> list[str]:
    """Return the classes that the labels name, or that they count."""
    found = [_text(sample, choice.label) for part in samples.values() for shard in part for sample in shard]
    numbers = [value for value in found if isinstance(value, int)]
    names = {value for value in found if isinstance(value, str)}
    if numbers and names:
        raise UserError(
            f"{reader.store.place} has labels that are numbers and labels that are names; set dataset.label to a "
            "member with one kind."
        )
    return (
        sorted(names)
        if names
        else numbered_classes(torch.tensor(numbers), len(found), reader.store.place)
        if numbers
        else []
    )


def _box(about: Mapping[str, Any], where: str) -> list[int]:
    box = about.get("box")
    if not (isinstance(box, list) and len(box) == 4 and all(type(side) is int and abs(side) < 1 << 31 for side in box)):
        raise UserError(f"{where} has no box; repeat the command that wrote the shards.")
    return box


def _required(image_size: int | None) -> int:
    if image_size is None:
        raise UserError(
            "dataset.image_size has no value, and only shards of icl_msr.shards know their own; set it to pixels."
        )
    return image_size


def _names(store: Store, train: str | list[str] | None, test: str | list[str] | None) -> dict[str, list[Entry]]:
    """Return the shards of `train`, and of `test` if there are any, by the names or patterns of the config."""
    patterns = {"train": _expanded(train), "test": _expanded(test)}
    needed = [name for names in patterns.values() for name in names]
    if needed and not any(set("*?[") & set(name) for name in needed):
        there = {entry.name: entry for entry in store.entries(needed)}
    elif store.place.startswith("http"):
        raise UserError(
            f"{store.place} cannot be listed; name the shards, as in dataset.train='train-{{0000..1023}}.tar'."
        )
    else:
        there = {entry.name: entry for entry in store.entries() if entry.name.endswith(".tar")}
    if not there:
        raise UserError(f"{store.place} has no shards (.tar); set dataset.url to a folder that has, or write some.")
    found: dict[str, list[Entry]] = {}
    for part, wanted in patterns.items():
        begins = ("train",) if part == "train" else ("val", "test")
        if wanted:
            chosen = [name for name in there if any(fnmatchcase(name, pattern) for pattern in wanted)]
            if not chosen:
                raise UserError(f"dataset.{part} names no shard of {store.place}, which has {', '.join([*there][:3])}.")
        else:
            chosen = [name for name in there if name.rpartition("/")[2].lower().startswith(begins)]
        found[part] = [there[name] for name in chosen]
    if not found["train"]:
        found["train"] = [entry for entry in there.values() if entry not in found["test"]]
    if not found["train"]:
        raise UserError(f"{store.place} has no shards to train on; name them with dataset.train.")
    return {part: entries for part, entries in found.items() if entries}


def _expanded(names: str | list[str] | None) -> list[str]:
    """Return names with each range in braces, such as `{000..127}`, written out."""
    found: list[str] = []
    for name in [names] if isinstance(names, str) else names or []:
        braces = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        if braces is None:
            found.append(name)
            continue
        low, high, width = int(braces[1]), int(braces[2]), len(braces[1])
        if not 0 <= high - low < 1_000_000:
            raise UserError(f"{name} names no shards, or more than a million; write {{000..127}}.")
        whole = [f"{name[: braces.start()]}{k:0{width}d}{name[braces.end() :]}" for k in range(low, high + 1)]
        found += _expanded(whole)
    return found
