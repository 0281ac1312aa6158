"""What all sources of real images share: read a file, fit it to a square, show its object or its background."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as F

from icl_msr.core.errors import UserError
from icl_msr.data.crops import boxes_of, crop_to_boxes, moved
from icl_msr.data.dataset import ArraySplit, Dataset

TrainOn = Literal["full", "fg"]
Region = Literal["full", "fg", "crop", "only_fg", "only_bg"]
REGIONS: tuple[Region, ...] = ("full", "fg", "crop", "only_fg", "only_bg")
"""The whole image; the inside of the object's box, stretched to a square; a crop as large from a random place, which
shows what cropping itself does; the object on black; the object in black."""

_CHUNK = 256  # images a thread decodes before it reports
_PART = 4096  # images of an array handled at once


def read_image(source: Path | bytes, name: str) -> Tensor:
    """Decode an image file, or its bytes, to uint8 (3, H, W); grey, palette, CMYK and 16-bit images become 8-bit RGB.

    torchvision's decoder is two to three times as fast as PIL's and equal to it; PIL reads the formats it lacks.
    `name` stands in the UserError for a file that is missing, cut short or no image.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        if data.startswith(b"\x89PNG"):
            Image.open(
                BytesIO(data)
            ).verify()  # torchvision's decoder takes the process along where a checksum is wrong
        try:
            image: Tensor = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        except (RuntimeError, ValueError):
            image = torch.from_numpy(np.array(Image.open(BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise UserError(f"{name} is no image of a known format; replace the file or remove it.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as an image ({error}); replace the file or remove it.") from error
    return image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8)


def fit(image: Tensor, size: int, *, nearest: bool = False) -> Tensor:
    """Resize the short side to `size` pixels and cut the centre square: uint8 (..., H, W) to (..., size, size)."""
    if min(image.shape[-2:]) != size:
        mode = F.InterpolationMode.NEAREST_EXACT if nearest else F.InterpolationMode.BILINEAR
        image = F.resize(image, [size], mode, antialias=True)
    square: Tensor = F.center_crop(image, [size, size])
    return square


def fit_all(images: Tensor, size: int, *, nearest: bool = False) -> Tensor:
    """`fit` of many images (N, ..., H, W), in parts to bound the memory."""
    return torch.cat([fit(part, size, nearest=nearest) for part in _parts(images)])


def show(images: Tensor, masks: Tensor, region: Region) -> Tensor:
    """The `region` (see `REGIONS`) of square uint8 images (N, 3, S, S) with bool masks (N, S, S), a whole split."""
    if region == "full":
        return images
    if region == "fg":
        return crop_to_boxes(images, boxes_of(masks), images.shape[-1])
    if region == "crop":
        boxes = moved(boxes_of(masks), images.shape[-2], images.shape[-1], torch.arange(len(images)))
        return crop_to_boxes(images, boxes, images.shape[-1])
    return images * (masks if region == "only_fg" else ~masks)[:, None]


def stack(load: Callable[[int], Tensor], count: int, doing: str) -> Tensor:
    """`load(0)`, ..., `load(count - 1)` from a pool of threads into one tensor, with a progress bar after 2 s."""
    first = load(0)
    result = first.new_empty((count, *first.shape))

    def fill(start: int) -> int:
        for i in range(start, min(start + _CHUNK, count)):
            item = load(i)
            if item.shape != first.shape:
                raise UserError(
                    f"Image {i} is {_size(item)} where the first is {_size(first)} pixels; "
                    "set dataset.image_size to bring all to one size."
                )
            result[i] = item
        return min(_CHUNK, count - start)

    began = time.monotonic()
    bar = progress_bar()
    task = bar.add_task(doing, total=count)
    with ThreadPoolExecutor(cores()) as pool, ExitStack() as shown:
        for done in pool.map(fill, range(0, count, _CHUNK)):
            bar.update(task, advance=done)
            if not bar.live.is_started and time.monotonic() - began > 2:
                shown.enter_context(bar)
    return result


def progress_bar() -> Progress:
    """Of images: how many are done, how many a second, and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Channel means and standard deviations over all pixels of uint8 (N, 3, S, S), as values in [0, 1]."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([_histogram(images[:, c]) for c in range(3)]).double() / images[:, 0].numel()
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).sqrt().clamp(min=1e-3)
    return _triple(mean), _triple(std)


def resident(
    name: str, classes: Sequence[str], train: ArraySplit, tests: Mapping[str, ArraySplit], train_on: TrainOn
) -> Dataset:
    """A data set of whole images in memory, trained on what `train_on` says; tests with masks show every region."""
    if train_on == "fg":
        if train.masks is None:
            raise UserError(
                f"dataset.train_on=fg needs to know where the object is, and {name} has no masks for its training "
                "images; use dataset.train_on=full."
            )
        train = ArraySplit(show(train.images, train.masks, "fg"), train.labels)
    shown: dict[str, ArraySplit] = {}
    for test, split in tests.items():
        if split.masks is None:
            shown[test] = split
            continue
        for region in REGIONS:
            masks = split.masks if region == "full" else None
            key = test_name(test, region, single=len(tests) == 1)
            shown[key] = ArraySplit(show(split.images, split.masks, region), split.labels, masks)
    mean, std = statistics(train.images)
    return Dataset(name, classes, train.images.shape[-1], train, shown, mean=mean, std=std)


def test_name(test: str, region: Region, *, single: bool) -> str:
    """The key of a region of a test set in `Dataset.tests`."""
    return region if single else f"{test}_{region}"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _histogram(channel: Tensor) -> Tensor:
    """Counts (256,) of the values of a uint8 tensor, without a wide copy of the whole of it."""
    return torch.stack([torch.bincount(part.flatten(), minlength=256) for part in _parts(channel)]).sum(0)


def _parts(images: Tensor) -> Iterator[Tensor]:
    return (images[start : start + _PART] for start in range(0, len(images), _PART))


def _triple(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"
