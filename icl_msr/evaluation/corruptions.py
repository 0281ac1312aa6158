"""Fourteen of the fifteen corruptions of ImageNet-C for batches of uint8 images on any device.

Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019. The
fifteenth, frost, needs photographs of frost, which we do not have. It is left out, also of the mean.

`LEVELS` holds the strengths that the authors published for 32 pixels (CIFAR-10-C), 64 (Tiny ImageNet-C) and 224
(ImageNet-C). An image of another size takes those of the nearest size, by ratio. Three things differ from the published
code. Random numbers are a hash of (seed, image, corruption, severity) instead of a sequence. Values are rounded to the
nearest level instead of cut off. The motion blur is our own, while theirs is ImageMagick's.

N images of S x S pixels; values are in [0, 1] inside.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, one_hot, pad

from icl_msr.core.randomness import keys, uniforms

Corruption = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
LEFT_OUT = ("frost",)
"""Corruptions of ImageNet-C that are missing here: frost needs photographs of frost."""

_CHUNK_BYTES = 2**27
"""Bytes of random numbers that are held at a time."""

Levels = Mapping[Corruption, Sequence[Any]]

_ZOOMS_SMALL = [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)]

LEVELS: Mapping[int, Levels] = MappingProxyType(
    {
        32: {
            "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],  # standard deviation
            "shot_noise": [500, 250, 100, 75, 50],  # photons of white
            "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],  # share of the values
            "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],  # radius, sigma of its edge
            "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],  # sigma, reach, times
            "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],  # radius, sigma
            "zoom_blur": _ZOOMS_SMALL,  # end, step
            "snow": [  # mean, std, zoom, threshold, radius and sigma of the motion, share of the image
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ],
            "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],  # strength, decay of the details
            "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],  # added to V of HSV
            "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],  # factor
            "elastic_transform": [  # of 32: strength, sigma, jitter of the corners
                (0, 0, 0.08),
                (0.05, 0.2, 0.07),
                (0.08, 0.06, 0.06),
                (0.1, 0.04, 0.05),
                (0.1, 0.03, 0.03),
            ],
            "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],  # factor of the size
            "jpeg_compression": [80, 65, 58, 50, 40],  # quality
        },
        64: {
            "gaussian_noise": [0.04, 0.08, 0.12, 0.15, 0.18],
            "shot_noise": [250, 100, 50, 30, 15],
            "impulse_noise": [0.01, 0.02, 0.05, 0.08, 0.14],
            "defocus_blur": [(0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)],
            "glass_blur": [(0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)],
            "motion_blur": [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
            "zoom_blur": _ZOOMS_SMALL,
            "snow": [
                (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
            ],
            "fog": [(0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
            "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
            "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
            "elastic_transform": [(0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03),
                                  (0.16, 0.03, 0.02)],
            "pixelate": [0.9, 0.8, 0.7, 0.6, 0.5],
            "jpeg_compression": [65, 58, 50, 40, 25],
        },
        224: {
            "gaussian_noise": [0.08, 0.12, 0.18, 0.26, 0.38],
            "shot_noise": [60, 25, 12, 5, 3],
            "impulse_noise": [0.03, 0.06, 0.09, 0.17, 0.27],
            "defocus_blur": [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
            "glass_blur": [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
            "motion_blur": [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
            "zoom_blur": [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
            "snow": [
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ],
            "fog": [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
            "brightness": [0.1, 0.2, 0.3, 0.4, 0.5],
            "contrast": [0.4, 0.3, 0.2, 0.1, 0.05],
            "elastic_transform": [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02),
                                  (0.12, 0.01, 0.02)],  # of 244, as published
            "pixelate": [0.6, 0.5, 0.4, 0.3, 0.25],
            "jpeg_compression": [25, 18, 15, 10, 7],
        },
    }
)  # fmt: skip
"""Strengths by image size and corruption, severities 1 to 5."""


def published_size(size: int) -> int:
    """Return the published image size whose strengths apply to images of `size` pixels."""
    return min(LEVELS, key=lambda known: abs(math.log(known / size)))


def corrupt(images: Tensor, corruption: Corruption, severity: int, *, seed: int, index: Tensor) -> Tensor:
    """Return corrupted uint8 images (N, 3, S, S), in the same size and on the same device.

    `severity` is 1 to 5. `index` (N,) int64 are the images' positions in their data set. The random numbers depend on
    them, on `seed`, on the corruption and on the severity, but not on the batch or the device.
    """
    size = images.shape[-1]
    level = LEVELS[published_size(size)][corruption][severity - 1]
    number = CORRUPTIONS.index(corruption)
    rows = max(1, _CHUNK_BYTES // (8 * 4 * 3 * size**2))
    parts = []
    for chunk, numbers in zip(torch.split(images, rows), torch.split(index.to(images.device), rows), strict=True):
        draw = Draw(keys(seed, severity, numbers, view=-100 - number))
        parts.append(_quantise(_CORRUPT[corruption](chunk.float() / 255, level, draw)))
    return torch.cat(parts) if parts else images


class Draw:
    """A sequence of random numbers for each of N images."""

    def __init__(self, key: Tensor) -> None:
        self.key, self.used = key, 0

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers in (0, 1): float32 (N, *shape)."""
        count = math.prod(shape)
        values = uniforms(self.key, count, self.used).clamp(min=2.0**-25)
        self.used += count
        return values.view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers: float32 (N, *shape)."""
        values: Tensor = torch.special.ndtri(self.uniform(*shape).double())
        return values.float()


def gaussian_noise(x: Tensor, std: float, draw: Draw) -> Tensor:
    """Add Gaussian noise of standard deviation `std`, as in low light."""
    return x + std * draw.normal(*x.shape[1:])


def shot_noise(x: Tensor, photons: float, draw: Draw) -> Tensor:
    """Replace each value by a Poisson number of photons; `photons` is the mean for white."""
    cumulative = _poisson(photons).to(x.device)
    levels = (x * 255).round().long()
    # Row l of the table lies between l and l + 1, so that all rows form one sorted line.
    line = (cumulative + torch.arange(256, device=x.device)[:, None]).flatten()
    found = torch.searchsorted(line, levels + draw.uniform(*x.shape[1:]).double(), right=True)
    return ((found - levels * cumulative.shape[1]) / photons).float()


@lru_cache(maxsize=16)
def _poisson(photons: float) -> Tensor:
    """Return the distribution functions of the 256 levels: float64 (256, counts), below 1."""
    rate = torch.arange(256, dtype=torch.float64)[:, None] * photons / 255
    count = torch.arange(math.ceil(photons + 12 * photons**0.5 + 12), dtype=torch.float64)
    log = torch.xlogy(count, rate) - rate - torch.lgamma(count + 1)
    return torch.exp(log).cumsum(1).clamp(max=1 - 2.0**-40)


def impulse_noise(x: Tensor, share: float, draw: Draw) -> Tensor:
    """Set a `share` of the values to one or zero, half of them each (salt and pepper)."""
    u = draw.uniform(*x.shape[1:])
    return torch.where(u < share, (u < share / 2).float(), x)


def defocus_blur(x: Tensor, level: tuple[float, float], draw: Draw) -> Tensor:
    """Average over a disk; `level` is (radius, sigma of its edge)."""
    return _filter(x, disk(*level).to(x.device))


def disk(radius: float, sigma: float) -> Tensor:
    """Return a disk (2 r + 1, 2 r + 1) that sums to 1, its edge smoothed by a Gaussian of 3 taps (large disks: 5)."""
    reach = max(8, round(radius))
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    aliased = (line[:, None] ** 2 + line**2 <= radius**2).double()
    taps = torch.arange(-1.0, 2.0) if radius <= 8 else torch.arange(-2.0, 3.0)
    edge = torch.exp(-(taps.double() ** 2) / (2 * sigma**2))
    edge = edge / edge.sum()
    soft = _filter((aliased / aliased.sum())[None, None], edge[:, None] * edge)
    return soft[0, 0].float()


def glass_blur(x: Tensor, level: tuple[float, int, int], draw: Draw) -> Tensor:
    """Blur, exchange pixels with near ones several times, and blur again; `level` is (sigma, reach, times)."""
    sigma, reach, times = level
    blur = _gaussian(x.shape[-1], sigma, "nearest", 4.0).to(x)
    x = (blur @ x @ blur.T * 255 + 1e-3).floor() / 255  # cut, as published; whole numbers stay
    for _ in range(times):
        offsets = (draw.uniform(2, *x.shape[2:]) * 2 * reach).long() - reach
        source = pushed(offsets, reach).flatten(1)[:, None]
        x = x.flatten(2).gather(2, source.expand(-1, 3, -1)).view_as(x)
    return blur @ x @ blur.T


def pushed(offsets: Tensor, reach: int) -> Tensor:
    """Return the source of each pixel's value when pixels copy near ones in turn: int64 (N, S, S).

    The published code goes from the last pixel to the first. Each pixel takes the current value of the pixel at its
    `offsets` (N, 2, S, S), rows and columns. (The intention was to exchange the two.) A pixel whose neighbour was
    visited before takes the neighbour's source. These chains are followed for all pixels at once, by doubling.
    """
    size = offsets.shape[-1]
    line = torch.arange(size, device=offsets.device)
    inside = (line > reach) & (line <= size - reach)
    inside = (inside[:, None] & inside).flatten()
    here = torch.arange(size**2, device=offsets.device)
    moved = (offsets[:, 0] * size + offsets[:, 1]).flatten(1) + here
    target = torch.where(inside, moved, here)
    follow = torch.where(target > here, target, here)
    for _ in range(math.ceil(math.log2(size**2)) + 1):
        follow = follow.gather(1, follow)
    return target.gather(1, follow).view(-1, size, size)


def motion_blur(x: Tensor, level: tuple[float, float], draw: Draw) -> Tensor:
    """Blur along a line, up to 45 degrees from the horizontal; `level` is (radius, sigma)."""
    return trail(x, *level, angle=(draw.uniform()[:, None] * 2 - 1) * math.pi / 4)


def trail(x: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:
    """Blur by a one-sided Gaussian of 2 r + 1 taps along `angle` (N, 1), in radians, from the nearest pixels."""
    taps = torch.arange(2 * round(radius) + 1, device=x.device)
    weights = torch.exp(-(taps**2) / (2 * sigma**2))
    line = torch.arange(x.shape[-1], device=x.device)
    down, across = ((taps * part(angle)).round().long() for part in (torch.sin, torch.cos))
    blurred = torch.zeros_like(x)
    for tap, weight in enumerate(weights / weights.sum()):
        rows = (line + down[:, tap, None]).clamp(0, len(line) - 1)
        columns = (line + across[:, tap, None]).clamp(0, len(line) - 1)
        blurred += weight * _at(x, rows[:, :, None].expand(-1, -1, len(line)), columns[:, None])
    return blurred


def zoom_blur(x: Tensor, level: tuple[float, float], draw: Draw) -> Tensor:
    """Average the image and its enlargements; `level` is (end, step) of their factors."""
    factors = np.arange(1, *level)
    return (x + sum(zoomed(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Return the middle of images (N, C, S, S), enlarged to S x S by bilinear interpolation with aligned corners."""
    size = x.shape[-1]
    crop = math.ceil(size / factor)
    low = (size - crop) // 2
    middle = x[..., low : low + crop, low : low + crop]
    large = interpolate(middle, size=[round(crop * factor)] * 2, mode="bilinear", align_corners=True)
    low = (large.shape[-1] - size) // 2
    return large[..., low : low + size, low : low + size]


def snow(x: Tensor, level: tuple[float, ...], draw: Draw) -> Tensor:
    """Whiten the image and add two layers of blurred flakes.

    `level` is (mean, std, zoom, threshold, radius and sigma of the motion, share of the image).
    """
    mean, std, zoom, threshold, radius, sigma, share = level
    flakes = zoomed(mean + std * draw.normal(1, *x.shape[2:]), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = trail(flakes, radius, sigma, angle=(0.25 + 0.5 * draw.uniform()[:, None]) * math.pi)
    gray = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    pale = share * x + (1 - share) * torch.maximum(x, gray * 1.5 + 0.5)
    return pale + flakes + flakes.flip(2, 3)


def fog(x: Tensor, level: tuple[float, float], draw: Draw) -> Tensor:
    """Add a cloud and keep the brightness; `level` is (strength, decay of the details)."""
    strength, decay = level
    size = x.shape[-1]
    cloud = plasma(2 ** math.ceil(math.log2(size)), decay, draw)[:, None, :size, :size]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * cloud) * brightest / (brightest + strength)


def plasma(size: int, decay: float, draw: Draw) -> Tensor:
    """Return a fractal landscape in [0, 1] on a torus by the diamond-square algorithm: (N, size, size).

    `size` is a power of two. The noise of each finer grid is divided by `decay` squared, as in the published code.
    """
    height = draw.uniform(1, 1) * 0
    roughness = 1.0
    while height.shape[-1] < size:
        n = height.shape[-1]
        noise = (draw.uniform(3, n, n) * 2 - 1) * roughness
        corners = height + height.roll(-1, 1)
        centres = (corners + corners.roll(-1, 2)) / 4 + noise[:, 0]
        across = (height + height.roll(-1, 2) + centres + centres.roll(1, 1)) / 4 + noise[:, 1]
        down = (height + height.roll(-1, 1) + centres + centres.roll(1, 2)) / 4 + noise[:, 2]
        upper, lower = torch.stack([height, across], 3).flatten(2), torch.stack([down, centres], 3).flatten(2)
        height = torch.stack([upper, lower], 2).flatten(1, 2)
        roughness /= decay**2
    low, high = height.amin((1, 2), keepdim=True), height.amax((1, 2), keepdim=True)
    return (height - low) / (high - low).clamp(min=1e-12)


def brightness(x: Tensor, added: float, draw: Draw) -> Tensor:
    """Add to the value in HSV. Hue and saturation stay, so all channels grow by one factor."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


def contrast(x: Tensor, factor: float, draw: Draw) -> Tensor:
    """Scale the differences from the channel's mean by `factor`."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Tensor, level: tuple[float, float, float], draw: Draw) -> Tensor:
    """Apply a random affine map, then displace pixels by a smooth random field.

    `level` is (strength, sigma, jitter of the corners), as shares of the size.
    """
    size = x.shape[-1]
    base = 244 if published_size(size) == 224 else size
    strength, sigma, jitter = (base * part for part in level)
    middle, side = size // 2, size // 3
    corners = x.new_tensor([[side, side], [side, -side], [-side, -side]]) + middle  # (x, y)
    moved = corners + (draw.uniform(3, 2) * 2 - 1) * jitter
    ones = x.new_ones(len(x), 3, 1)
    # The map from a pixel's new place to its old one: A with [moved, 1] A = corners.
    back = torch.linalg.solve(torch.cat([moved, ones], 2).double(), corners.expand(len(x), 3, 2).double())
    line = torch.arange(size, device=x.device, dtype=torch.float64)
    here = torch.stack(
        [line.expand(size, size), line[:, None].expand(size, size), torch.ones_like(line).expand(size, size)], 2
    )
    place = (here.view(1, -1, 3) @ back).view(len(x), size, size, 2).float()
    x = _bilinear(x, place[..., 1], place[..., 0], _mirror)
    if strength == 0:
        return x
    smooth = _gaussian(size, sigma, "reflect", 3.0).to(x)
    field = smooth @ (draw.uniform(2, size, size) * 2 - 1) @ smooth.T * strength
    return _bilinear(x, field[:, 1] + line[:, None].float(), field[:, 0] + line.float(), _reflect)


def pixelate(x: Tensor, factor: float, draw: Draw) -> Tensor:
    """Shrink by a factor and enlarge again, with Pillow's box filter."""
    size = x.shape[-1]
    small = int(size * factor)
    levels = (x * 255).round()
    for out in (small, size):
        box = boxes(levels.shape[-1], out).to(x)
        levels = (box @ (levels @ box.T + 0.5).floor() + 0.5).floor()
    return levels / 255


@lru_cache(maxsize=16)
def boxes(size: int, out: int) -> Tensor:
    """Return weights (out, size) that resize a line. A pixel counts fully or not at all."""
    scale = size / out
    width = max(scale, 1.0)
    weights = torch.zeros(out, size, dtype=torch.float64)
    for i in range(out):
        centre = (i + 0.5) * scale
        low, high = max(0, int(centre - width / 2 + 0.5)), min(size, int(centre + width / 2 + 0.5))
        inside = [-0.5 < (j - centre + 0.5) / width <= 0.5 for j in range(low, high)]
        weights[i, low:high] = torch.tensor(inside, dtype=torch.float64)
    return weights / weights.sum(1, keepdim=True)


_LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
_CHROMINANCE = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8 for _ in range(4)],
]
"""Quantisation tables of annex K of ITU-T T.81."""


def jpeg_compression(x: Tensor, quality: int, draw: Draw) -> Tensor:
    """Apply the losses of JPEG (T.81): colours at half resolution, and rounded cosine transforms of 8 x 8 blocks."""
    size = x.shape[-1]
    whole = -(-size // 16) * 16
    red, green, blue = (pad(x, (0, whole - size, 0, whole - size), mode="replicate") * 255).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    colours = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], 1) + 128
    fours = colours.round().view(len(x), 2, whole // 2, 2, whole // 2, 2).sum((3, 5))
    # Many means of four end in a half. The reference encoder rounds them down and up in turn.
    small = ((fours + 1 + torch.arange(whole // 2, device=x.device) % 2) / 4).floor()
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    y = _rounded_blocks(luma.round()[:, None], _LUMINANCE, percent)
    cb, cr = (_doubled(_rounded_blocks(small, _CHROMINANCE, percent)) - 128).unbind(1)
    y = y[:, 0]
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    return rgb[..., :size, :size] / 255


def _rounded_blocks(channels: Tensor, table: list[list[int]], percent: float) -> Tensor:
    """Return channels (N, C, H, W), 0 to 255, with the cosine coefficients of their blocks rounded."""
    steps = ((channels.new_tensor(table) * math.floor(percent) + 50) / 100).floor().clamp(1, 255)
    line = torch.arange(8, dtype=channels.dtype, device=channels.device)
    cosine = torch.cos((2 * line + 1) * line[:, None] * math.pi / 16) / 2
    cosine[0] /= 2**0.5
    n, colours, height, width = channels.shape
    blocks = (channels - 128).view(n, colours, height // 8, 8, width // 8, 8).transpose(3, 4)
    rounded = (cosine @ blocks @ cosine.T / steps).round() * steps
    restored: Tensor = (cosine.T @ rounded @ cosine).transpose(3, 4).reshape(channels.shape)
    return (restored + 128).round().clamp(0, 255)


def _doubled(colours: Tensor) -> Tensor:
    """Double the size. In each direction, a value is 3/4 of the nearest and 1/4 of the next one."""
    for axis in (2, 3):
        count = colours.shape[axis]
        line = torch.arange(count, device=colours.device)
        before, after = (colours.index_select(axis, (line + step).clamp(0, count - 1)) for step in (-1, 1))
        pair = torch.stack([0.75 * colours + 0.25 * before, 0.75 * colours + 0.25 * after], axis + 1)
        colours = pair.flatten(axis, axis + 1)
    return colours.round()


_CORRUPT: Mapping[Corruption, Callable[[Tensor, Any, Draw], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def _quantise(x: Tensor) -> Tensor:
    return (x * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each channel with a kernel (k, k), k odd. Borders are mirrored at the centres of the outer pixels."""
    reach, size = kernel.shape[-1] // 2, x.shape[-1]
    line = _mirror(torch.arange(-reach, size + reach, device=x.device), size)
    wide = x[..., line, :][..., line].flatten(0, 1)[:, None]
    return conv2d(wide, kernel.to(x)[None, None]).view_as(x)


@lru_cache(maxsize=32)
def _gaussian(size: int, sigma: float, border: Literal["nearest", "reflect"], truncate: float) -> Tensor:
    """Return a matrix (size, size) that smooths a line, including its border, with SciPy's conventions."""
    reach = int(truncate * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(taps.double() ** 2) / (2 * max(sigma, 1e-9) ** 2))
    places = torch.arange(size)[:, None] + taps
    places = places.clamp(0, size - 1) if border == "nearest" else _reflect(places, size)
    return (one_hot(places, size) * (weights / weights.sum())[:, None]).sum(1).float()


def _mirror(places: Tensor, size: int) -> Tensor:
    """Return places on a line, mirrored at the centres of the outer pixels: 2 1 | 0 1 2 ..."""
    period = max(2 * size - 2, 1)
    places = places.remainder(period)
    return torch.minimum(places, period - places)


def _reflect(places: Tensor, size: int) -> Tensor:
    """Return places on a line, mirrored at the edges of the outer pixels: 1 0 | 0 1 2 ..."""
    places = places.remainder(2 * size)
    return torch.minimum(places, 2 * size - 1 - places)


def _at(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return images (N, C, S, S) sampled at whole places that broadcast to (N, S, S)."""
    place = (rows * x.shape[-1] + columns).flatten(1)[:, None]
    return x.flatten(2).gather(2, place.expand(-1, x.shape[1], -1)).view_as(x)


def _bilinear(x: Tensor, rows: Tensor, columns: Tensor, fold: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return images (N, C, S, S) sampled between pixels (N, S, S); `fold` maps places beyond the border inside."""
    size = x.shape[-1]
    top, left = rows.floor(), columns.floor()
    down, across = (rows - top)[:, None], (columns - left)[:, None]
    result = torch.zeros_like(x)
    for step_down, weight_down in ((0, 1 - down), (1, down)):
        for step_across, weight_across in ((0, 1 - across), (1, across)):
            place = (fold(top.long() + step_down, size), fold(left.long() + step_across, size))
            result += weight_down * weight_across * _at(x, *place)
    return result
