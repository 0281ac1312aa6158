"""Backgrounds: put the object of an image on another background (Ryali et al. 2021; Mo et al. 2021).

The object is known by a mask or a box. Two views that share the object and not the background reward features of the
object. The colours and places are changed later, for object and background alike, by the recipe of the view.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from icl_msr.augment.geometry import blurring, separable
from icl_msr.augment.recipe import Probability, ascending
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers, uniforms

Weights = Annotated[list[Probability], Field(min_length=2, max_length=2), AfterValidator(ascending)]

NARROWEST = 1 / 8
"""Least width of the strip beside an object whose background is given to other images, as a share of the side."""

# Positions of the random numbers of a key, by purpose. Results of old runs depend on them: append, never renumber.
_CHANGED, _WEIGHT, _DONOR, _COLOUR, _NOISE = 0, 1, 2, slice(3, 6), 16


@dataclass(kw_only=True)
class Background:
    """Change the background of some views.

    With the mask m, which is 1 on the object, a pixel x of a changed image becomes m x + (1 - m) ((1 - w) x + w b). The
    new background b is another training image, cleared of its object. All random numbers depend only on the key of an
    image and view, and so does the choice of the other image. So a view is the same in any batch, worker or rank.
    """

    fill: Literal["image", "tiles", "noise", "colour"]
    """The new background. `image`: another image, whose object is covered by its own background; `tiles`: repeats of
    the widest strip beside the object of another image; `noise`: uniform noise; `colour`: one colour."""
    weight: Weights
    """Smallest and largest weight w of the new background. 1 replaces the old one."""
    probability: Probability
    """Probability that the background of a view is changed."""
    softness: NonNegativeFloat
    """Standard deviation of a Gaussian that softens the mask outside the object, in pixels of the image."""
    views: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """The views that are changed, counted from 0."""

    def require(self, views: int) -> None:
        """Check that an augmentation with this number of views has those that are changed.

        Raises:
            UserError: it has not.
        """
        if (last := max(self.views)) >= views:
            raise UserError(
                f"background.views names the view {last}, counted from 0, and augment.views lists {views}; "
                f"type background.views=[{views - 1}], or choose an augmentation with more views."
            )

    def donors(self, able: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """Return the image that gives its background to each image: int64 (N,), one of `able` and never itself.

        Args:
            able: int64 (M,), positions of at least two images that may give their background.
            index: int64 (N,), positions of the images.
            key: int64 (N,), see `core.randomness`.
        """
        place = integers(key, 1, first=_DONOR)[:, 0] % len(able)
        return torch.where(able[place] == index, able[(place + 1) % len(able)], able[place])

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor, others: Tensor, boxes: Tensor, key: Tensor) -> Tensor:
        """Return the images on their new backgrounds: float32 (N, 3, S, S), with values from 0 to 255.

        Args:
            images: uint8 (N, 3, S, S).
            masks: bool (N, S, S), true on the objects.
            others: uint8 (N, 3, S, S), the images that give their backgrounds.
            boxes: int64 (N, 4), boxes around the objects of `others`: x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
            key: int64 (N,), see `core.randomness`.
        """
        numbers = uniforms(key, _NOISE)
        low, high = self.weight
        weight = low + (high - low) * numbers[:, _WEIGHT]
        weight = weight * (numbers[:, _CHANGED] < self.probability)
        kept = masks[:, None].float()
        if self.softness > 0:
            blur = blurring(weight.new_full((1,), self.softness), masks.shape[-1]).expand(len(masks), -1, -1)
            with torch.autocast(images.device.type, enabled=False):
                kept = kept.maximum(separable(kept, blur, blur))
        new = self._new(others, boxes, key, numbers[:, _COLOUR])
        return torch.lerp(images.float(), new, weight[:, None, None, None] * (1 - kept))

    def _new(self, others: Tensor, boxes: Tensor, key: Tensor, colour: Tensor) -> Tensor:
        if self.fill == "noise":
            return 255 * uniforms(key, others[0].numel(), first=_NOISE).view(others.shape)
        if self.fill == "colour":
            return (255 * colour)[:, :, None, None].expand(others.shape)
        wider = boxes + boxes.new_tensor([-1, -1, 1, 1])  # the pixels at the edge of an object are mixed with it
        return cleared(others, wider.clamp(0, others.shape[-1]), everywhere=self.fill == "tiles").float()


def widest(boxes: Tensor, size: int) -> Tensor:
    """Return the width of the widest strip beside each box (N, 4) in an image of `size` x `size`, in pixels (N,)."""
    return _strips(boxes, size).amax(1)


def cleared(images: Tensor, boxes: Tensor, *, everywhere: bool = False) -> Tensor:
    """Cover the box of each image with repeats of the widest strip beside it.

    The strips lie left, right, above and below, and are as long as the image. The strip is repeated away from where the
    box begins. An image without a strip is returned as it is.

    Args:
        images: (N, C, S, S).
        boxes: int64 (N, 4): x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
        everywhere: True repeats the strip over the whole image.
    """
    size = images.shape[-1]
    x0, y0, x1, y1 = boxes[..., None].unbind(1)  # (N, 1) each
    strips = _strips(boxes, size)
    width, which = strips.max(1, keepdim=True)
    start = torch.stack([torch.zeros_like(x0), x1, torch.zeros_like(y0), y1], 1)[..., 0].gather(1, which)
    pixel = torch.arange(size, device=images.device)
    across = (which < 2) & (width > 0)
    down = (which >= 2) & (width > 0)
    x = torch.where(across, start + (pixel - x0) % width.clamp(min=1), pixel)
    y = torch.where(down, start + (pixel - y0) % width.clamp(min=1), pixel)
    source = y[:, :, None] * size + x[:, None, :]  # (N, S, S)
    if not everywhere:
        inside = ((pixel >= y0) & (pixel < y1))[:, :, None] & ((pixel >= x0) & (pixel < x1))[:, None, :]
        source = torch.where(inside, source, pixel[:, None] * size + pixel)
    return images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _strips(boxes: Tensor, size: int) -> Tensor:
    """Return the widths of the strips left and right of, above and below each box, (N, 4)."""
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([x0, size - x1, y0, size - y1], 1)
