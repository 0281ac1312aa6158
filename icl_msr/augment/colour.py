"""Colour jitter, grayscale and solarization of float images (N, 3, H, W) in [0, 1]. Each image has its own parameters.

The definitions are torchvision's for float images, so values are never rounded to 8 bits.
"""

from functools import lru_cache

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@lru_cache
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a value for each channel as (C, 1, 1). It is cached, because a copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device)[:, None, None]


def luma(images: Tensor) -> Tensor:
    """Return the gray value (N, H, W) of each pixel, ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    return torch.add(red * 0.2989, green, alpha=0.587).add_(blue, alpha=0.114)


def applies(chosen: Tensor) -> bool:
    """Return False if nothing is to be done for a batch on a CPU: `chosen` (N,) is False for all images.

    On a GPU it is always True, since the host would have to wait for the answer.
    """
    return chosen.device.type != "cpu" or bool(chosen.any())


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of each image, in its own order.

    The first three blend the image with black, with its mean gray, and with its grays. Every image goes through three
    blends, the hue shift and three more blends. Blends that its order does not need are the identity. So no group of
    images has to be selected, and the host never waits for the device. A CPU leaves out what no image needs.

    Args:
        images: (N, 3, H, W).
        factors: (N, 4) brightness, contrast and saturation factors and the hue shift in turns; (1, 1, 1, 0) leaves
            an image unchanged.
        order: (N, 4) int64, a permutation of 0 .. 3 per image: which of the four comes first, second, ...
    """
    strength = factors.gather(1, order)
    position, turn = torch.arange(4, device=order.device), (order == HUE).int().argmax(1, keepdim=True)
    before = torch.where(position < turn, strength, 1)
    after = torch.where(position > turn, strength, 1)
    for step in (0, 1, 2):
        images = _blend(images, before[:, step], order[:, step])
    if applies(factors[:, HUE] != 0):
        images = rotate_hue(images, factors[:, HUE])
    for step in (1, 2, 3):
        images = _blend(images, after[:, step], order[:, step])
    return images


def _blend(images: Tensor, keep: Tensor, operation: Tensor) -> Tensor:
    if not applies(keep != 1):
        return images
    factor = keep[:, None, None, None]
    if not applies(operation != BRIGHTNESS):
        return (images * factor).clamp_(0, 1)
    gray = luma(images)
    rest = torch.stack([operation == SATURATION, operation == CONTRAST]) * (1 - keep)
    other = gray * rest[0, :, None, None] + (gray.mean((1, 2)) * rest[1])[:, None, None]
    return torch.addcmul(other[:, None], images, factor).clamp_(0, 1)


def rotate_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of HSV by `shift` (N,), in turns from -1/2 to 1/2."""
    red, green, blue = images.unbind(1)
    value = red.maximum(green).maximum(blue)
    low = red.minimum(green).minimum(blue)
    chroma = value - low
    # With t = (colour - low) / chroma, the hue is 1 + t_green + t_blue - t_red sixths of a turn from red through green
    # to blue. It is the negative of that on the way back, where blue exceeds green.
    sixths = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-12)).add_(1)
    turns = sixths.copysign_(green - blue).div_(6).add_(shift[:, None, None])
    # colour = value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 turns) mod 6 and n = 5, 3, 1
    n = torch.arange(5, 0, -2, device=images.device)[:, None, None]
    part = (turns[:, None] + (n / 6 + 1)).frac_()
    part = part.sub_(1 / 3).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], part, chroma[:, None], value=-1)


def grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """Replace the images with `chosen` (N,) True by their gray values."""
    return torch.lerp(images, luma(images)[:, None], chosen[:, None, None, None].float())


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert values of one half or more in the images with `chosen` (N,) True."""
    return torch.lerp(images, torch.minimum(images, 1 - images), chosen[:, None, None, None].float())
