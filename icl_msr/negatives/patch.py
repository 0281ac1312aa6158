"""Patch negatives: an image rebuilt from small patches of itself at random places (Ge et al. 2021, section 3)."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.errors import UserError
from icl_msr.randomness import integers


class PatchNegatives:
    """Tiles a canvas with d x d patches of the image, each from a place of its own, and cuts it to the image's size.

    Every negative of every image has its own d, uniform over the integers from `smallest` to `largest`, which are
    given for images of side `reference` and scale with the actual one. Patches are neither flipped nor rotated.
    """

    def __init__(
        self,
        *,
        count: PositiveInt,
        smallest: PositiveInt,
        largest: PositiveInt,
        reference: PositiveInt,
        alpha: PositiveFloat,
        repulsion: NonNegativeFloat,
    ) -> None:
        if smallest > largest or largest >= reference:
            raise UserError(
                f"patches of {smallest} to {largest} pixels do not fit: choose negatives.smallest <= negatives.largest "
                f"< negatives.reference, which is {reference}."
            )
        self.count = count
        self.smallest = smallest
        self.largest = largest
        self.reference = reference
        self.alpha = alpha
        """Factor of the similarity to a negative inside the exponent of an InfoNCE loss; read by the losses."""
        self.repulsion = repulsion
        """Weight of the distance to a negative in a loss without negatives of its own; read by the losses."""

    def sizes(self, side: int) -> tuple[int, int]:
        """Smallest and largest d, in pixels, for images whose shorter side is `side`."""
        low, high = (round(d * side / self.reference) for d in (self.smallest, self.largest))
        return min(max(low, 1), side - 1), min(max(high, 1), side - 1)

    def __call__(self, query: Tensor, keys: Tensor) -> Tensor:
        """m negatives (N, m, C, H, W) of each image.

        Args:
            query: (N, C, H, W) of any dtype, usually the first view, augmented and normalised; H and W at least 2.
            keys: int64 (N,), from `icl_msr.randomness.keys`, on the device of the images.
        """
        n, c, height, width = query.shape
        m = self.count
        low, high = self.sizes(min(height, width))
        down, across = height // low + 1, width // low + 1
        # One number for d and one for each cell of the finest grid: its high half places the patch vertically, its
        # low half horizontally.
        numbers = integers(keys, m * (1 + down * across)).view(n * m, -1)
        d = low + (numbers[:, :1] * (high - low + 1) >> 32)
        top = (numbers[:, 1:] >> 16) * (height - d) >> 16
        left = (numbers[:, 1:] & 0xFFFF) * (width - d) >> 16
        corner = top * width + left
        row, column = torch.arange(height, device=d.device), torch.arange(width, device=d.device)
        cell = (row // d * across)[:, :, None] + (column // d)[:, None]
        inside = (row % d * width)[:, :, None] + (column % d)[:, None]
        source = corner.gather(1, cell.view(n * m, -1)).add_(inside.view(n * m, -1))
        pixels = query.reshape(n, 1, c, -1).expand(-1, m, -1, -1)
        return pixels.gather(3, source.view(n, m, 1, -1).expand(-1, -1, c, -1)).view(n, m, c, height, width)
