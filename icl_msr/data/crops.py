"""Crops to the object: cut each image of a batch to its own box and resize it, all at once."""

import torch
from torch import Tensor

from icl_msr.core.randomness import integers, keys

_STEPS = 4096  # integer filter weights make every sum exact, so that a crop has the same bytes on every machine
_MOVED = -4  # the `view` of the hash that moves boxes
_CHUNK = 128  # images resized at once: small temporaries stay in the cache


def boxes_around(masks: Tensor) -> Tensor:
    """Return the smallest box (x0, y0, x1, y1) around each mask, in pixels, x1 and y1 exclusive.

    `masks` is bool (N, H, W), and the boxes are int64 (N, 4). An empty mask gives the box of the whole image.
    """
    edges = []
    for occupied in (masks.any(1), masks.any(2)):  # columns, then rows
        line = (occupied | ~occupied.any(1, keepdim=True)).to(torch.uint8)
        edges.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], dim=1)


def square_boxes(boxes: Tensor, size: int) -> Tensor:
    """Grow each box (N, 4) int64 to a square along its shorter side, and move it into the `size` x `size` image."""
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (high - low).amax(1, keepdim=True).clamp(max=size)
    start = ((low + high - side) // 2).clamp(min=0).minimum(size - side)
    return torch.cat([start, start + side], dim=1)


def moved(boxes: Tensor, height: int, width: int, index: Tensor) -> Tensor:
    """Return boxes (N, 4) of the same sizes at uniformly random places of `height` x `width` images.

    The place depends only on the image's number, `index` (N,), and not on the object or the machine.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    free = torch.tensor([width, height], device=boxes.device) - size
    start = integers(keys(0, 0, index.to(boxes.device), view=_MOVED), 2) * (free + 1) >> 32
    return torch.cat([start, start + size], dim=1)


def crop_to_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each image to its box and resize the cut to `size` x `size`, bilinear with anti-aliasing.

    `images` is uint8 (N, C, H, W). `boxes` (N, 4) holds x0, y0, x1, y1 in pixels, x1 and y1 exclusive, inside the
    image. The result is uint8 (N, C, size, size). A box that is not square is stretched; `square_boxes` avoids that.
    """
    height, width = images.shape[-2:]
    crops = images.new_empty((*images.shape[:2], size, size))
    for start in range(0, len(images), _CHUNK):
        batch, box = images[start : start + _CHUNK].double(), boxes[start : start + _CHUNK].double()
        down = _resampling(box[:, 1], box[:, 3], height, size)[:, None]
        across = _resampling(box[:, 0], box[:, 2], width, size)[:, None]
        total = down.sum(-1)[..., :, None] * across.sum(-1)[..., None, :]
        crops[start : start + _CHUNK] = ((down @ batch @ across.mT) / total + 0.5).floor().to(torch.uint8)
    return crops


def _resampling(low: Tensor, high: Tensor, length: int, size: int) -> Tensor:
    """Return integer weights (N, size, length) of a triangle filter that resizes [low, high) of `length` pixels."""
    step = ((high - low) / size)[:, None, None]
    centre = low[:, None, None] + (torch.arange(size, device=low.device).double()[None, :, None] + 0.5) * step
    pixel = torch.arange(length, device=low.device).double()[None, None, :] + 0.5
    weight = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    inside = (pixel > low[:, None, None]) & (pixel < high[:, None, None])
    return (weight * inside * _STEPS).round()
