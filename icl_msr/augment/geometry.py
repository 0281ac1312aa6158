"""Crop, flip, resize and blur of a batch. Each image has its own parameters.

All four act on rows and columns separately. So each is a pair of small matrices per image, which `separable` applies.
On a CPU, the crops of large views are torch's own.
"""

from collections.abc import Sequence
from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["bilinear", "bicubic"]

TRIES = 10
"""Number of candidate boxes of a random resized crop before it falls back to the centre, as in torchvision."""


_LARGE = 96
"""Smallest side of a view that a CPU cuts out one image at a time, in pixels."""


def resize(images: Tensor, size: int) -> Tensor:
    """Resize whole images uint8 (N, C, H, W) to uint8 (N, C, size, size) by torchvision: bilinear, antialiased."""
    from torchvision.transforms.v2.functional import resize  # here, because it takes as long as torch

    return images if images.shape[-2:] == (size, size) else resize(images, [size, size], antialias=True)


def random_boxes(
    uniform: Tensor, height: int | Tensor, width: int | Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Return boxes int64 (N, 4) as (top, left, height, width) of random resized crops (Szegedy et al. 2015).

    The distribution is that of torchvision's `RandomResizedCrop`. The area is uniform in `scale` and the aspect ratio
    log-uniform in `ratio`. The first of ten candidates that fits is taken, else the largest central box with an allowed
    ratio.

    Args:
        uniform: float (N, 22) in [0, 1).
        height: of the images, one number for all or (N,).
        width: of the images, one number for all or (N,).
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
    """
    ones = torch.ones_like(uniform[:, :1], dtype=torch.int64)
    size = torch.stack([ones[:, 0] * height, ones[:, 0] * width], 1)
    height, width = size[:, :1], size[:, 1:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:, :TRIES])
    low, high = log(ratio[0]), log(ratio[1])
    aspect = torch.exp(low + (high - low) * uniform[:, TRIES : 2 * TRIES])
    # The fallback is last. argmax returns the first maximum, so it takes the fallback only if no candidate fits.
    h = torch.cat([(area / aspect).sqrt(), torch.minimum(height, width / ratio[0])], 1).round().long()
    w = torch.cat([(area * aspect).sqrt(), torch.minimum(width, height * ratio[1])], 1).round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    box = torch.cat([h.gather(1, first), w.gather(1, first)], 1)
    free = size - box
    drawn = (uniform[:, 2 * TRIES : 2 * TRIES + 2] * (free + 1)).long()
    corner = torch.where(first < TRIES, torch.minimum(drawn, free), free // 2)
    return torch.cat([corner, box], 1)


def resampling(
    start: Tensor,
    length: Tensor,
    source: int,
    size: int,
    flip: Tensor | None = None,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Return matrices float32 (N, size, source) that resize the pixels start .. start + length - 1 of a line to `size`.

    The filter is that of torchvision's and Pillow's antialiased resize, normalised inside the box: a triangle for
    `bilinear`, Keys' cubic with a = -1/2 for `bicubic`.

    Args:
        start: int64 (N,).
        length: int64 (N,).
        source: pixels of the line.
        size: pixels of the result.
        flip: bool (N,), True if the result is mirrored.
        interpolation: the filter.
    """
    pixel = torch.arange(size, device=start.device)
    if flip is not None:
        pixel = torch.where(flip[:, None], size - 1 - pixel, pixel)
    step = length[:, None] / size
    centre = start[:, None] + (pixel + 0.5) * step
    position = torch.arange(source, device=start.device) + 0.5
    inside = (position > start[:, None]) & (position < (start + length)[:, None])
    distance = (position - centre[..., None]).abs_().div_(step.clamp(min=1)[..., None])
    if interpolation == "bicubic":
        near, far = distance.clamp(max=1), distance.clamp_(1, 2)  # their parts of the filter add up
        weights = (1.5 * near - 2.5) * near.square() + 1 + ((2.5 - 0.5 * far) * far - 4) * far + 2
    else:
        weights = (1 - distance).clamp_(min=0)
    weights = weights.mul_(inside[:, None])
    return weights.div_(weights.sum(-1, keepdim=True))


def crop(images: Tensor, boxes: Tensor, size: int, flip: Tensor, interpolation: Interpolation = "bilinear") -> Tensor:
    """Cut each image to its box, resize the cut and mirror it: float32 (N, C, size, size), in the range of the images.

    A GPU and small views take a matrix product for the whole batch. On a CPU, the matrices of a large view are mostly
    zeros, and torch's own resize, one image after the other, is faster.

    Args:
        images: (N, C, H, W) of any dtype.
        boxes: int64 (N, 4) as (top, left, height, width).
        size: of the result, in pixels.
        flip: bool (N,), True if the result is mirrored.
        interpolation: filter of the resize, with antialiasing.
    """
    if images.device.type == "cpu" and size >= _LARGE:
        views = images.new_empty(len(images), images.shape[1], size, size, dtype=torch.float32)
        for image, (top, left, height, width), mirrored, view in zip(
            images, boxes.tolist(), flip.tolist(), views, strict=True
        ):
            cut = image[None, :, top : top + height, left : left + width].float()
            resized = F.interpolate(cut, size=(size, size), mode=interpolation, antialias=True)[0]
            view.copy_(resized.flip(-1) if mirrored else resized)
        return views
    top, left, height, width = boxes.unbind(1)
    rows = resampling(top, height, images.shape[2], size, None, interpolation)
    columns = resampling(left, width, images.shape[3], size, flip, interpolation)
    return separable(images, rows, columns)


def blurring(sigma: Tensor, size: int) -> Tensor:
    """Return matrices float32 (N, size, size) of a Gaussian blur with reflected borders; sigma (N,) in pixels.

    The Gaussian is not cut off at a kernel size, but at size - 1 pixels. Sigma 0 gives the identity.
    """
    distance = torch.arange(2 * size, device=sigma.device)
    bell = torch.exp(-distance.square() / (2 * sigma[:, None].square().clamp(min=1e-6)))
    bell[:, size:] = 0
    bell = bell.where(bell > 1e-12, 0)  # less does not count in float32, and a CPU is slow with denormal numbers
    around = torch.cat([bell[:, 1:size].flip(1), bell[:, :size]], 1)  # of each distance from 1 - size to size - 1
    weights = around.unfold(1, size, 1).flip(1)  # bell[|row - column|]
    mirrored = bell.unfold(1, size, 1)[:, :size]  # bell[row + column]; border pixels have no mirror image
    weights[:, :, 1:] += mirrored[:, :, 1:]
    weights[:, :, :-1] += mirrored[:, :, 1:].flip(1, 2)
    return weights.div_(weights.sum(-1, keepdim=True))


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a matrix to the rows and one to the columns of each image, and return float32 (N, C, h, w).

    Args:
        images: (N, C, H, W) of any dtype.
        rows: (N, h, H).
        columns: (N, w, W).
    """
    n, c, height, width = images.shape
    lines = images.transpose(1, 2).contiguous().float()
    lines = torch.bmm(rows, lines.view(n, height, c * width))
    lines = torch.bmm(lines.view(n, -1, width), columns.mT)
    return lines.view(n, rows.shape[1], c, -1).transpose(1, 2).contiguous()
