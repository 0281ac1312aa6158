"""Functions for all sources of real images: read a file, fit it to a square, show its object or its background."""

import os
import time
import warnings
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from icl_msr.core import terminal
from icl_msr.core.errors import UserError
from icl_msr.core.storage import read_regular
from icl_msr.data.crops import boxes_around, crop_to_boxes, moved
from icl_msr.data.dataset import ArraySplit, Dataset

TrainOn = Literal["full", "fg"]
Region = Literal["full", "fg", "crop", "only_fg", "only_bg"]
REGIONS: tuple[Region, ...] = ("full", "fg", "crop", "only_fg", "only_bg")
"""Shown regions, in order: the whole image; the inside of the object's box, stretched to a square; a crop as large from
a random place, as a control of cropping itself; the object on black; the background with the object in black."""

MaskValues = Literal["trimap", "voc"] | list[int] | None
MASK_VALUES = {"trimap": [1], "voc": list(range(1, 255))}
"""Values of the object in published masks: the pet without the border in Oxford-IIIT Pet's trimaps, and every object
without the void around it in Pascal VOC."""

LARGEST = 2**30
"""Largest size of an image file, in bytes."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # none of them runs another program
_ORIENTATION = 0x0112  # EXIF tag
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice as many pixels are an error

_CHUNK = 256  # images that a thread decodes before it reports
_PART = 4096  # images of an array that are handled at once


def read_image(source: Path | bytes, name: str, reduction: int = 1) -> Tensor:
    """Decode an image file, or its bytes, to uint8 (3, H, W), by the rules of the table in data/README.md.

    This is the only decoder of the package, so an image has the same bytes on every path. Pillow reads the header and
    decodes. torchcodec decodes JPEG if it is installed, to the same bytes and faster.

    Args:
        source: the path of the file, or its content.
        name: the name of the file in an error message.
        reduction: 1, 2, 4 or 8. A JPEG is decoded to this fraction of its sides, rounded up, in a fraction of the time.
            Images of other formats keep their size.

    Raises:
        UserError: the file is missing, cut short, or no image.
    """
    with _named(name):
        data = source if isinstance(source, bytes) else read_regular(source, LARGEST)
        image = _open(data)
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        pixels = _jpeg(data) if reduction == 1 and _plain_jpeg(image) else None
        if pixels is None:
            pixels = _upright(torch.from_numpy(_rgb(image)).permute(2, 0, 1), image)
        return packed(pixels)


def packed(image: Tensor) -> Tensor:
    """Return an image (C, H, W) with the channels of a pixel side by side in memory. Resizing is faster so."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def read_mask(source: Path | bytes, name: str, values: MaskValues = None) -> Tensor:
    """Decode a mask file, or its bytes, to bool (H, W), true on the object.

    With `values`, the object is where the grey value or the palette index is one of them. Without `values`, it is where
    the value is not zero in the file's own depth. There are two exceptions. If the image has transparent pixels, the
    object is where it is not transparent. With lossy compression, which rings at edges, the object is above half of the
    largest value.

    Raises:
        UserError: the file cannot be read, the mask is empty or covers the whole image, or `values` are given for a
            lossy file, which does not keep them.
    """
    with _named(name):
        data = source if isinstance(source, bytes) else read_regular(source, LARGEST)
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
    """Return height and width of the upright image in pixels. Only the header is read.

    Raises:
        UserError: the file is missing, or no image.
    """
    with _named(name), _open(source) as image:
        if image.format == "TIFF":
            image.load()  # applies the orientation
        turned = _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn errors of decoders into a `UserError` that names the file. A damaged file can raise almost anything."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:
        largest = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise UserError(
            f"{name} has more pixels than the {largest} million that are read; scale it down or remove it."
        ) from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image of a known format; replace the file or remove it.") from None
    except Exception as error:
        raise UserError(f"{name} cannot be read as an image ({error}); replace the file or remove it.") from error


def _open(source: bytes | Path) -> Image.Image:
    """Return the image with its header read. All checksums of a PNG are checked, since the decoder stops early."""
    if isinstance(source, bytes) and source.startswith(b"\x89PNG"):
        Image.open(BytesIO(source), formats=["PNG"]).verify()
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def _plain_jpeg(image: Image.Image) -> bool:
    """Return whether the image is an upright JPEG in RGB or grey. torchcodec turns images by rules of its own."""
    silent = "exif" not in image.info and b"Orientation" not in image.info.get("xmp", b"")
    upright = silent or image.getexif().get(_ORIENTATION) == 1  # Pillow looks into both
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and upright


def _jpeg(data: bytes) -> Tensor | None:
    """Return the pixels as stored, uint8 (3, H, W); None if torchcodec is missing or refuses the file."""
    decode = _jpeg_decoder()
    if decode is None:
        return None
    try:
        return decode(data)
    except (RuntimeError, ValueError):
        return None


@cache
def _jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """Return torchcodec's decoder; None if torchcodec is missing or was built for another torch."""
    try:
        return partial(import_module("torchcodec.decoders").decode_jpeg, mode="RGB")
    except (ImportError, OSError, RuntimeError):
        return None


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels as stored, uint8 (H, W, 3), with deep values scaled to eight bits and transparency on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_eight_bits(np.asarray(image), image.format)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return np.array(image.convert("RGB"))


def _eight_bits(values: NDArray[Any], kind: str | None) -> NDArray[np.uint8]:
    """Scale grey values of more than eight bits to uint8."""
    if values.dtype.kind == "u" or kind == "PPM":  # Pillow widens the 16 bits of PPM to 32
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
    """Return the mask of the object as stored, bool (H, W); see `read_mask`."""
    lossy = _is_lossy(image, data)
    if values is not None:
        if lossy:
            raise ValueError("its compression changes values, and dataset.mask_values speaks of exact ones")
        index = np.asarray(image)
        if index.ndim != 2:
            raise ValueError("it is in colour, and dataset.mask_values speaks of grey values or a palette")
        return np.isin(index, MASK_VALUES[values] if isinstance(values, str) else values)
    if image.has_transparency_data:
        opacity = np.asarray(image.convert("RGBA"))[:, :, 3]
        if opacity.min() < 255:
            return opacity > 0
    if data.startswith(b"\x89PNG") and data[24] == 16 and image.mode in ("RGB", "RGBA"):
        colours = 1 if data[25] == 4 else 3  # grey with opacity, or colours
        pixels = _deep_png(data)[:colours].amax(0).numpy()  # Pillow keeps only the upper eight bits of a colour
    else:
        pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "LA", "RGBA", "CMYK") else image)
        pixels = pixels.max(axis=2) if pixels.ndim == 3 else pixels
    return pixels > (pixels.max() / 2 if lossy else 0)


def _is_lossy(image: Image.Image, data: bytes) -> bool:
    if image.format == "WEBP":
        return b"VP8L" not in data  # the chunk of a lossless image
    return image.format in ("JPEG", "MPO", "AVIF") or image.info.get("compression") in ("jpeg", "webp")


def _deep_png(data: bytes) -> Tensor:
    """Return the values of a PNG file with 16 bits per channel, int32 (C, H, W)."""
    decode = import_module("torchcodec.decoders").decode_png
    deep: Tensor = decode(data, mode="UNCHANGED", output_dtype=torch.uint16)
    return deep.int()


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 (upright) to 8; 1 if EXIF cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def require_resize(resize: int | None, size: int) -> None:
    """Check that a square of `size` pixels can be cut out of an image whose short side is `resize` pixels.

    Raises:
        UserError: it is too small.
    """
    if resize is not None and resize < size:
        raise UserError(
            f"dataset.resize={resize} is smaller than dataset.image_size={size}, the square that is cut out; set it to "
            f"{size} or more, or to null."
        )


def _upright(pixels: Tensor, image: Image.Image) -> Tensor:
    """Turn and mirror pixels (C, H, W) as EXIF says. Pillow has already done so for TIFF and removed the tag."""
    turn = _orientation(image)
    if turn in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flipped = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(turn)
    return pixels.flip(flipped) if flipped else pixels


def fit(image: Tensor, size: int, *, nearest: bool = False, resize: int | None = None) -> Tensor:
    """Resize the short side and cut the centre square: uint8 (..., H, W) to (..., size, size).

    Args:
        image: (..., H, W).
        size: side of the square in pixels.
        nearest: True takes the nearest pixel, for masks.
        resize: length of the short side in pixels before the square is cut; None: `size`.
    """
    from torchvision.transforms.v2 import functional as F  # here, because it takes as long as torch

    short = resize or size
    if min(image.shape[-2:]) != short:
        mode = F.InterpolationMode.NEAREST_EXACT if nearest else F.InterpolationMode.BILINEAR
        image = F.resize(image, [short], mode, antialias=True)
    square: Tensor = F.center_crop(image, [size, size])
    return square


def fit_all(images: Tensor, size: int, *, nearest: bool = False, resize: int | None = None) -> Tensor:
    """Apply `fit` to many images (N, ..., H, W), in parts to limit the memory."""
    return torch.cat([fit(part, size, nearest=nearest, resize=resize) for part in _parts(images)])


def show(images: Tensor, masks: Tensor, region: Region) -> Tensor:
    """Return the `region` (see `REGIONS`) of a whole split: uint8 images (N, 3, S, S) with bool masks (N, S, S)."""
    if region == "full":
        return images
    if region == "fg":
        return crop_to_boxes(images, boxes_around(masks), images.shape[-1])
    if region == "crop":
        boxes = moved(boxes_around(masks), images.shape[-2], images.shape[-1], torch.arange(len(images)))
        return crop_to_boxes(images, boxes, images.shape[-1])
    return images * (masks if region == "only_fg" else ~masks)[:, None]


def stack(load: Callable[[int], Tensor], count: int, doing: str) -> Tensor:
    """Stack `load(0)`, ..., `load(count - 1)`, computed by a pool of threads. Show a progress bar after 2 s.

    Raises:
        UserError: the images differ in size.
    """
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


def progress_bar(of: str = "images") -> Progress:
    """Return a progress bar that shows the number done, the number per second and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(of), TimeRemainingColumn())
    return terminal.progress_bar(*columns)


def statistics(images: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return channel means and standard deviations over all pixels of uint8 (N, 3, S, S), as values in [0, 1]."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([_histogram(images[:, c]) for c in range(3)]).double() / images[:, 0].numel()
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).sqrt().clamp(min=1e-3)
    return _triple(mean), _triple(std)


def resident(
    name: str, classes: Sequence[str], train: ArraySplit, tests: Mapping[str, ArraySplit], train_on: TrainOn
) -> Dataset:
    """Make a data set of whole images in memory. Test splits with masks are shown in every region.

    Raises:
        UserError: `train_on` is `fg`, and the training images have no masks.
    """
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
    """Return the key of a region of a test set in `Dataset.tests`."""
    return region if single else f"{test}_{region}"


class _Rate(ProgressColumn):
    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} {self.of}/s")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _histogram(channel: Tensor) -> Tensor:
    """Return counts (256,) of the values of a uint8 tensor, without a wider copy of the whole tensor."""
    return torch.stack([torch.bincount(part.flatten(), minlength=256) for part in _parts(channel)]).sum(0)


def _parts(images: Tensor) -> Iterator[Tensor]:
    return (images[start : start + _PART] for start in range(0, len(images), _PART))


def _triple(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"
