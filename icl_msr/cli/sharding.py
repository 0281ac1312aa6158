"""The job of `icl_msr.shards`: a data set as WebDataset tars with an index beside each."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchvision.io import encode_png
from torchvision.transforms.v2 import functional as F

from icl_msr.core.config import Settings, build
from icl_msr.core.errors import UserError, reason
from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import read_regular, readable, replacing
from icl_msr.data import tars
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.files import FileSplit
from icl_msr.data.listing import SUFFIXES
from icl_msr.data.shards import MANIFEST, Manifest, Stored
from icl_msr.data.sources import LARGEST, Region, cores, progress_bar, read_image, read_mask, read_size
from icl_msr.data.stores import Store, is_url, put_whole


@dataclass(frozen=True)
class Options:
    """Where shards go, and how they are made."""

    to: str
    images: int
    """Images in a shard."""
    short_side: int | None
    """Larger images are scaled down to this short side, in pixels."""
    quality: int
    """JPEG quality of these, 1 to 100."""


def job(settings: Settings, options: Options) -> float:
    """Write the data set of a checked config.

    Raises:
        UserError: an image cannot be read, or shards of another data set are there.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    node = dict(settings.dataset)
    if "resident_size" in node:
        node["resident_size"] = 0  # the files are copied as they are, so nothing is decoded
    dataset: Dataset = build(node)
    with RunFolder(folder).locked():
        written, kept = write(dataset, options, folder)
    if is_url(options.to):
        folder.rmdir()
    console = Console(highlight=False, soft_wrap=True)
    if dataset.labelled is not None:
        console.print("dataset.labelled is another data set and is not written; name it again when you train.")
    console.print(f"{written} shards written, {kept} kept   {options.to}")
    return 0.0


def write(dataset: Dataset, options: Options, folder: Path) -> tuple[int, int]:
    """Write the shards that are missing. Return how many were written and how many were kept.

    Args:
        dataset: the data set. Its splits are files, or arrays, which become PNG files.
        options: where and how.
        folder: the folder itself, or one for unfinished shards if they go to a store.
    """
    splits, tests, balanced = _splits(dataset)
    manifest = Manifest(
        format="icl-msr shards 1",
        name=dataset.name,
        classes=list(dataset.classes),
        superclasses=None if dataset.superclasses is None else list(dataset.superclasses),
        image_size=dataset.image_size,
        colours=(dataset.mean, dataset.std) if isinstance(dataset.train, ArraySplit) else None,
        images_per_shard=options.images,
        short_side=options.short_side,
        quality=options.quality,
        content=dataset.trained_on(),
        splits={name: _about(split, options) for name, split in splits.items()},
        tests=tests,
        balanced=balanced,
        shifted=list(dataset.shifted),
    )
    store = Store(options.to)
    _claim(store, manifest)
    there = {entry.name: entry.size for entry in store.entries()}
    jobs = [(name, k, shard) for name in splits for k, shard in enumerate(manifest.shards(name))]

    def one(name: str, k: int, shard: str) -> tuple[int, bool]:
        split = splits[name]
        index = range(k * options.images, min((k + 1) * options.images, len(split)))
        if (
            shard in there
            and tars.parse(store.load(shard + tars.SUFFIX, tars.LARGEST_INDEX) or b"", there[shard]) is not None
        ):
            return len(index), False
        with replacing(folder / shard, "repeat the command") as file:
            content = tars.write(file, _samples(split, index, dataset.classes, _home(split), options))
        if store.remote:
            _upload(store, shard, folder / shard)
            _upload(store, shard + tars.SUFFIX, content)
            (folder / shard).unlink()
        else:
            put_whole(folder / (shard + tars.SUFFIX), content)
        return len(index), True

    written = 0
    with progress_bar() as bar, ThreadPoolExecutor(cores()) as pool:
        task = bar.add_task("Writing shards", total=sum(map(len, splits.values())))
        try:
            for images, new in pool.map(lambda each: one(*each), jobs):
                written += new
                bar.update(task, advance=images)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return written, len(jobs) - written


def _splits(dataset: Dataset) -> tuple[dict[str, Split], dict[str, tuple[str, Region]], str | None]:
    """Return the splits to store by name, the stored split and region of each test split, and the balanced one's name.

    Test splits that show the same files in several regions are stored once.
    """
    splits: dict[str, Split] = {"train": _with_useful_masks(dataset.train)}
    tests: dict[str, tuple[str, Region]] = {}
    known: dict[int, str] = {}
    for test, split in dataset.tests.items():
        same = id(split.files) if isinstance(split, FileSplit) else id(split)
        if same not in known:
            name = "test" if test == "full" else test.removesuffix("_full")
            known[same] = _free(re.sub(r"[^A-Za-z0-9_-]", "_", name)[:70] or "test", splits)
            splits[known[same]] = _with_useful_masks(split)
        tests[test] = (known[same], split.region if isinstance(split, FileSplit) else "full")
    if dataset.balanced is None:
        return splits, tests, None
    balanced = _free("balanced", splits)
    splits[balanced] = _with_useful_masks(dataset.balanced)
    return splits, tests, balanced


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return next(free for k in range(len(taken) + 1) if (free := f"{name}-{k}" if k else name) not in taken)


def _about(split: Split, options: Options) -> Stored:
    objects, values = None, None
    if isinstance(split, FileSplit):
        objects = "masks" if split.mask_files is not None else "boxes" if split.boxes is not None else None
        values = split.mask_values if options.short_side is None else None  # scaled masks are bool
    elif isinstance(split, ArraySplit) and split.masks is not None:
        objects = "masks"
    return Stored.model_validate({"images": len(split), "objects": objects, "mask_values": values})


def _with_useful_masks(split: Split) -> Split:
    """Return an array without its masks if one is empty or covers its image, since no file may be such a mask."""
    if not isinstance(split, ArraySplit) or split.masks is None:
        return split
    flat = split.masks.flatten(1)
    return split if flat.any(1).all() and not flat.all(1).any() else replace(split, masks=None)


def _claim(store: Store, manifest: Manifest) -> None:
    """Write the manifest.

    Raises:
        UserError: shards of another data set, or of other options, are there.
    """
    content = (manifest.model_dump_json(indent=1) + "\n").encode()
    if not store.remote:
        Path(store.place).mkdir(parents=True, exist_ok=True)
    before = store.load(MANIFEST, tars.LARGEST_INDEX)
    if before is None:
        _upload(store, MANIFEST, content)
    elif before != content:
        with readable(f"{store.place}/{MANIFEST}", "restore it from a copy, or write elsewhere, --to FOLDER"):
            old = dict(json.loads(before))
        changed = [key for key, value in json.loads(content).items() if old.get(key) != value]
        raise UserError(
            f"{store.place} holds shards that differ in {', '.join(changed)}; write these elsewhere, --to FOLDER."
        )


def _upload(store: Store, name: str, content: bytes | Path) -> None:
    try:
        store.save(name, content)
    except Exception as error:  # a store can raise almost anything
        raise UserError(
            f"{store.path(name)} cannot be written ({reason(error)}); check --to and your access to it, and repeat "
            "the command."
        ) from error


def _home(split: Split) -> str:
    """Return the folder that all files of a split share. Their paths below it travel in the shards."""
    files = getattr(split, "files", None) or []
    folders = {os.path.dirname(file) for file in files}
    if not folders:
        return ""
    home = os.path.commonpath(folders) if len({os.path.isabs(folder) for folder in folders}) == 1 else ""
    return home if len(folders) > 1 else os.path.dirname(home)


def _samples(
    split: Split, index: range, classes: list[str] | Any, home: str, options: Options
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the members of each image."""
    files = getattr(split, "files", None)
    for i in index:
        about: dict[str, Any] = {}
        if files is not None:
            about["file"] = os.path.relpath(files[i], home) if home else files[i].lstrip("/")
        label = int(split.labels[i])
        if label >= 0:
            about["class"] = classes[label]
        members = _of_file(split, i, about, options) if isinstance(split, FileSplit) else _of_array(split, i, options)
        if label >= 0:
            members["cls"] = str(label).encode()
        members["json"] = json.dumps(about, sort_keys=True).encode()
        yield f"{i:08d}", members


def _of_file(split: FileSplit, i: int, about: dict[str, Any], options: Options) -> dict[str, bytes]:
    name = split.files[i]
    source = split.source(i)
    content = source if isinstance(source, bytes) else _content(source, name)
    height, width = read_size(content, name)
    scale = (options.short_side or height) / min(height, width)
    smaller = options.short_side is not None and scale < 1
    members = {}
    if smaller:
        pixels = F.resize(read_image(content, name), [options.short_side], antialias=True)
        members["jpg"] = _jpeg(pixels, options.quality)
        height, width = pixels.shape[1:]
    else:
        members[_suffix(content, name)] = content
    if split.mask_files is not None:
        place = split.mask_source(i)
        mask = place if isinstance(place, bytes) else _content(place, split.mask_files[i])
        if options.short_side is not None:
            shown = read_mask(mask, split.mask_files[i], split.mask_values)[None].byte()
            members["mask.png"] = _mask(F.resize(shown, [height, width], F.InterpolationMode.NEAREST_EXACT))
        else:
            members[f"mask.{_suffix(mask, split.mask_files[i])}"] = mask
    elif split.boxes is not None:
        x0, y0, x1, y1 = split.boxes[i].tolist()
        if smaller:
            x0, y0 = int(x0 * scale), int(y0 * scale)
            x1, y1 = min(width, -int(-x1 * scale // 1)), min(height, -int(-y1 * scale // 1))
        about["box"] = [x0, y0, x1, y1]
    return members


def _of_array(split: Split, i: int, options: Options) -> dict[str, bytes]:
    pixels = split.load(torch.tensor([i]))[0].cpu()
    masks = split.masks if isinstance(split, ArraySplit) else None
    members = {}
    if options.short_side is not None and options.short_side < pixels.shape[-1]:
        pixels = F.resize(pixels, [options.short_side], antialias=True)
        members["jpg"] = _jpeg(pixels, options.quality)
    else:
        members["png"] = bytes(encode_png(pixels).numpy())
    if masks is not None:
        size = list(pixels.shape[1:])
        members["mask.png"] = _mask(F.resize(masks[i][None].cpu().byte(), size, F.InterpolationMode.NEAREST_EXACT))
    return members


def _content(path: Path, name: str) -> bytes:
    try:
        return read_regular(path, LARGEST)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); replace the file or remove it.") from None


def _suffix(content: bytes, name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES:
        return suffix[1:]
    with Image.open(BytesIO(content)) as image:
        return {"JPEG": "jpg", "MPO": "jpg"}.get(str(image.format), str(image.format).lower())


def _jpeg(pixels: Tensor, quality: int) -> bytes:
    with BytesIO() as file:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        return file.getvalue()


def _mask(pixels: Tensor) -> bytes:
    """Return a mask (1, H, W) as a PNG file."""
    return bytes(encode_png(pixels * 255).numpy())
