"""Views as passes over whole batches, on any device."""

from typing import NamedTuple

import torch
from torch import Tensor

from icl_msr.augment import colour, geometry

_PIXELS = 2**16
"""Number of pixels that a CPU works on at a time, so that they stay in its cache."""


class Parameters(NamedTuple):
    """What is done to each of N images to make a view: crop, flip, jitter, gray, blur, solarize, in this order.

    None leaves a part out for all images.
    """

    boxes: Tensor | None
    """Crops, int64 (N, 4) as (top, left, height, width). None: the images have the size of the view."""
    interpolation: geometry.Interpolation
    """Filter that resizes the crops."""
    flip: Tensor
    """Bool (N,)."""
    factors: Tensor | None
    """Factors of the jitter, (N, 4), and the `order` of its parts, (N, 4); see `colour.jitter`."""
    order: Tensor | None
    gray: Tensor | None
    """Bool (N,)."""
    sigma: Tensor | None
    """Standard deviations of the blur, (N,), in pixels of the view; 0 leaves an image sharp."""
    solarize: Tensor | None
    """Bool (N,)."""

    def part(self, images: slice) -> "Parameters":
        """Return the parameters of some images."""
        return Parameters._make(value[images] if isinstance(value, Tensor) else value for value in self)


def render(
    images: Tensor, parameters: Parameters, size: int, scale: Tensor, shift: Tensor, memory_format: torch.memory_format
) -> Tensor:
    """Return a view of each image, times `scale` plus `shift`: float32 (N, 3, size, size).

    Args:
        images: uint8 (N, 3, H, W), or float32 from 0 to 255.
        parameters: of the views.
        size: of the views, in pixels.
        scale: (3, 1, 1), the factors of each channel, for values in [0, 1].
        shift: (3, 1, 1).
        memory_format: of the views.
    """
    device = images.device
    views = torch.empty(len(images), 3, size, size, device=device, memory_format=memory_format)
    step = max(1, _PIXELS // size**2) if device.type == "cpu" else len(images)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        with torch.autocast(device.type, enabled=False):
            view = _view(images[part], parameters.part(part), size)
        torch.addcmul(shift, view, scale, out=views[part])
    return views


def _view(images: Tensor, of: Parameters, size: int) -> Tensor:
    if of.boxes is None:
        view = torch.where(of.flip[:, None, None, None], images.flip(-1), images).float().div_(255)
    else:
        view = geometry.crop(images, of.boxes, size, of.flip, of.interpolation).div_(255)
        if of.interpolation == "bicubic":  # it overshoots at edges
            view.clamp_(0, 1)
    if of.factors is not None and of.order is not None:
        view = colour.jitter(view, of.factors, of.order)
    if of.gray is not None and colour.applies(of.gray):
        view = colour.grayscale(view, of.gray)
    if of.sigma is not None and colour.applies(of.sigma > 0):
        matrix = geometry.blurring(of.sigma, size)
        view = geometry.separable(view, matrix, matrix)
    if of.solarize is not None and colour.applies(of.solarize):
        view = colour.solarize(view, of.solarize)
    return view
