"""What all sources of real images share: read a file, fit it to a square, show its object or its background."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.data.crops import boxes_around, crop_to_boxes, moved
from icl_msr.data.dataset import ArraySplit, Dataset

TrainOn = Literal["full", "fg"]
Region = Literal["full", "fg", "crop", "only_fg", "only_bg"]
REGIONS: tuple[Region, ...] = ("full", "fg", "crop", "only_fg", "only_bg")
"""The whole image; the inside of the object's box, stretched to a square; a crop as large from a random place, which
shows what cropping itself does; the object on black; the object in black."""

MaskValues = Literal["trimap", "voc"] | list[int] | None
MASK_VALUES = {"trimap": [1], "voc": list(range(1, 255))}
"""What the object is in published masks: the pet of Oxford-IIIT Pet's trimaps, and not their border; every object of
Pascal VOC, and not the void around it."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # no format that runs another program
_ORIENTATION = 0x0112  # of EXIF
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")

_CHUNK = 256  # images a thread decodes before it reports
_PART = 4096  # images of an array handled at once


def read_image(source: Path | bytes, name: str) -> Tensor:
    """Decode an image file, or its bytes, to uint8 (3, H, W), by the rules of the table in data/README.md.

    This is the only decoder of the package, so that an image has the same bytes on every path. Pillow reads the header
    and decodes. JPEG is decoded by torchcodec where it is installed: the same bytes, faster.

    Args:
        source: the file, or its content.
        name: what a message calls it.

    Raises:
        UserError: the file is missing, cut short, or no image.
    """
    with _named(name):
        data = source if isinstance(source, bytes) else source.read_bytes()
        image = _open(data)
        pixels = _jpeg(data) if _plain_jpeg(image) else None
        if pixels is None:
            pixels = _upright(torch.from_numpy(_rgb(image)).permute(2, 0, 1), image)
        return pixels.contiguous()


def read_mask(path: Path, name: str, values: MaskValues = None) -> Tensor:
    """Decode a mask to bool (H, W), true on the object.

    Without `values`, the object is where a value is not zero in the file's own depth; where the image is not
    transparent, if it has transparent pixels; and above half of the largest value in a format that loses detail, which
    rings at edges. With them, the object is where the grey value or the index of the palette is one of them.

    Raises:
        UserError: the file cannot be read, or the mask is empty or covers the whole image.
    """
    with _named(name):
        data = path.read_bytes()
        image = _open(data)
        mask = _upright(torch.from_numpy(_object(image, data, values))[None], image)[0].contiguous()
    if mask.all() or not mask.any():
        what = "covers the whole image" if mask.any() else "is empty"
        raise UserError(
            f"The mask {name} {what}, so it shows no object; replace it, or say with dataset.mask_values which of its "
            "values are the object."
        )
    return mask


def read_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Return height and width of the upright image in pixels; only the header is read.

    Raises:
        UserError: the file is missing, or no image.
    """
    with _named(name), _open(source) as image:
        if image.format == "TIFF":
            image.load()  # turns it
        turned = _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which file could not be read. A damaged file makes a decoder raise almost anything."""
    try:
        yield
    except UnidentifiedImageError:
        raise UserError(f"{name} is no image of a known format; replace the file or remove it.") from None
    except Exception as error:
        raise UserError(f"{name} cannot be read as an image ({error}); replace the file or remove it.") from error


def _open(source: bytes | Path) -> Image.Image:
    """The image with its header read. The checksums of a PNG file are compared: its decoder stops before the last."""
    if isinstance(source, bytes) and source.startswith(b"\x89PNG"):
        Image.open(BytesIO(source), formats=["PNG"]).verify()
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def _plain_jpeg(image: Image.Image) -> bool:
    """Is it a JPEG file in RGB or grey that stands upright? torchcodec turns images by rules of its own."""
    upright = "exif" not in image.info or image.getexif().get(_ORIENTATION) == 1
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and upright


def _jpeg(data: bytes) -> Tensor | None:
    """Uint8 (3, H, W) as it is stored; None where torchcodec is missing or finds fault with the file."""
    decode = _jpeg_decoder()
    if decode is None:
        return None
    try:
        return decode(data)
    except (RuntimeError, ValueError):
        return None


@cache
def _jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """Import torchcodec when the first JPEG file is read; a build for another torch cannot be loaded."""
    try:
        return partial(import_module("torchcodec.decoders").decode_jpeg, mode="RGB")
    except (ImportError, OSError, RuntimeError):
        return None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Uint8 (H, W, 3) as it is stored: deep values scaled to eight bits, transparency on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_eight_bits(np.asarray(image), image.format)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return np.array(image.convert("RGB"))


def _eight_bits(values: NDArray[Any], kind: str | None) -> NDArray[np.uint8]:
    """Grey values of more than eight bits as uint8."""
    if values.dtype.kind == "u" or kind == "PPM":  # PPM: 16 bits, which Pillow widens to 32
        return np.asarray(values >> 8, np.uint8)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has values that are not finite")
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        low, high = 0, 1
    elif low >= 0 and high <= 255:
        low, high = 0, 255
    scaled = (values.astype(np.float64) - low) * (255 / max(high - low, 1e-12))
    return np.asarray(np.rint(scaled), np.uint8)


def _object(image: Image.Image, data: bytes, values: MaskValues) -> NDArray[np.bool_]:
    """Bool (H, W) as it is stored; see `read_mask`."""
    if values is not None:
        index = np.asarray(image)
        if index.ndim != 2:
            raise ValueError("it is in colour, and dataset.mask_values speaks of grey values or a palette")
        return np.isin(index, MASK_VALUES[values] if isinstance(values, str) else values)
    if image.has_transparency_data:
        opacity = np.asarray(image.convert("RGBA"))[:, :, 3]
        if opacity.min() < 255:
            return opacity > 0
    if data.startswith(b"\x89PNG") and data[24] == 16 and image.mode in ("RGB", "RGBA"):
        pixels = _deep_png(data)[:3].amax(0).numpy()  # Pillow keeps the upper eight bits of a colour
    else:
        pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "RGBA", "CMYK") else image)
        pixels = pixels.max(axis=2) if pixels.ndim == 3 else pixels
    return pixels > (pixels.max() / 2 if image.format in _LOSSY else 0)


def _deep_png(data: bytes) -> Tensor:
    """Int32 (C, H, W) of a PNG file of 16 bits a channel."""
    decode = import_module("torchcodec.decoders").decode_png
    deep: Tensor = decode(data, mode="UNCHANGED", output_dtype=torch.uint16)
    return deep.int()


def _orientation(image: Image.Image) -> int:
    """How the image must be turned to stand upright, 1 (not at all) to 8, by EXIF; 1 where EXIF cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(pixels: Tensor, image: Image.Image) -> Tensor:
    """(C, H, W), turned and mirrored as EXIF says. Pillow has done that to TIFF, and taken the tag away."""
    turn = _orientation(image)
    if turn in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(turn)
    return pixels.flip(flipped) if flipped else pixels


def fit(image: Tensor, size: int, *, nearest: bool = False) -> Tensor:
    """Resize the short side to `size` pixels and cut the centre square: uint8 (..., H, W) to (..., size, size)."""
    from torchvision.transforms.v2 import functional as F  # here, because it takes as long as torch

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
        return crop_to_boxes(images, boxes_around(masks), images.shape[-1])
    if region == "crop":
        boxes = moved(boxes_around(masks), images.shape[-2], images.shape[-1], torch.arange(len(images)))
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
