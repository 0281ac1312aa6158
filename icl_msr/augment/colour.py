"""Colour jitter, grayscale and solarization of float images (N, 3, H, W) in [0, 1], each image with its own parameters.

The definitions are torchvision's, for float images: nothing is rounded to 8 bits in between.
"""

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def luma(images: Tensor) -> Tensor:
    """Gray value (N, H, W) of each pixel, ITU-R BT.601."""
    red, green, blue = images.unbind(1)
    return torch.add(red * 0.2989, green, alpha=0.587).add_(blue, alpha=0.114)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order of each image's own.

    The first three blend the image with black, its mean gray and its grays. So every image takes three blends, the hue
    and three more blends, of which those that its own order does not call for are the identity: no group of images
    is picked out, and the device is never waited for.

    Args:
        images: (N, 3, H, W).
        factors: (N, 4) brightness, contrast and saturation factors and the hue shift in turns; (1, 1, 1, 0) leaves
            an image as it is.
        order: (N, 4) int64, a permutation of 0 .. 3 per image: which of the four comes first, second, ...
    """
    strength = factors.gather(1, order)
    turn = (order == HUE).int().argmax(1)
    for step in (0, 1, 2):
        images = _blend(images, strength[:, step], order[:, step], step < turn)
    images = rotate_hue(images, factors[:, HUE])
    for step in (1, 2, 3):
        images = _blend(images, strength[:, step], order[:, step], step > turn)
    return images


def _blend(images: Tensor, strength: Tensor, operation: Tensor, active: Tensor) -> Tensor:
    keep = torch.where(active, strength, 1)[:, None, None]
    gray = luma(images)
    mean = gray.mean((1, 2), keepdim=True)
    other = gray * ((1 - keep) * (operation == SATURATION)[:, None, None])
    other += mean * ((1 - keep) * (operation == CONTRAST)[:, None, None])
    return torch.addcmul(other[:, None], images, keep[:, None]).clamp_(0, 1)


def rotate_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of HSV by `shift` (N,) turns."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    is_red, is_green = red == value, green == value
    slope = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    sector = torch.where(is_red, 6.0, torch.where(is_green, 8.0, 10.0))
    hue = slope.div_(chroma.clamp(min=1e-12)).add_(sector).div_(6).add_(shift[:, None, None])
    # f(n) = value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6, n = 5, 3, 1 for red, green, blue
    offset = torch.tensor([5 / 6, 3 / 6, 1 / 6], device=images.device).view(3, 1, 1)
    k = (hue[:, None] + offset).frac_().mul_(6)
    k = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], k, chroma[:, None], value=-1)


def grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """Replace the images where `chosen` (N,) by their gray values."""
    return torch.where(chosen[:, None, None, None], luma(images)[:, None], images)


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert the bright half of the values (>= 0.5) where `chosen` (N,)."""
    return torch.where(chosen[:, None, None, None] & (images >= 0.5), 1 - images, images)
