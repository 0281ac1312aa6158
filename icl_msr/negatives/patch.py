"""Patch negatives: an image rebuilt from small patches of itself at random places (Ge et al. 2021, section 3)."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers
from icl_msr.core.views import AlphaMode, AlphaSchedule


class PatchNegatives:
    """Tiles a canvas with d x d patches of the image, each from a random place, and cuts it to the image's size.

    Every negative of every image has its own d, uniform over the integers from `smallest` to `largest`. These are given
    for images of side `reference` and scale with the actual side. In the paper, patches are neither flipped nor rotated
    and may overlap.

    Variants (ours):

    * `shuffle`: the patches are those of a grid on the image, each used once, in random order. If d does not divide the
      side, the last patches of the grid are moved inwards to fit, and the canvas cuts the patches at its own border.
    * `flips`: half of the patches are mirrored left to right.
    * `rotations`: each patch is rotated by 0, 90, 180 or 270 degrees.
    """

    copies_rows_from = 64
    """Smallest side in pixels at which a CPU copies rows of patches. Smaller images and GPUs gather single pixels."""

    def __init__(
        self,
        *,
        count: PositiveInt,
        smallest: PositiveInt,
        largest: PositiveInt,
        reference: PositiveInt,
        shuffle: bool,
        flips: bool,
        rotations: bool,
        alpha: PositiveFloat,
        alpha_mode: AlphaMode,
        alpha_schedule: AlphaSchedule,
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
        self.shuffle, self.flips, self.rotations = shuffle, flips, rotations
        # The losses read these; see `icl_msr.core.views.NonSemantic`.
        self.alpha, self.alpha_mode, self.alpha_schedule = alpha, alpha_mode, alpha_schedule
        self.repulsion = repulsion

    def sizes(self, side: int) -> tuple[int, int]:
        """Return the smallest and the largest d, in pixels, for images whose shorter side is `side`."""
        low, high = (round(d * side / self.reference) for d in (self.smallest, self.largest))
        return min(max(low, 1), side - 1), min(max(high, 1), side - 1)

    def __call__(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return m negatives of each image, (N, m, C, H, W).

        Args:
            query: (N, C, H, W) of any dtype, usually the first view, augmented and normalised; H and W at least 2.
            keys: int64 (N,), from `icl_msr.core.randomness.keys`, on the device of the images.
        """
        n, c, height, width = query.shape
        m = self.count
        low, high = self.sizes(min(height, width))
        down, across = height // low + 1, width // low + 1
        cells = down * across
        # One number gives d. Each cell of the finest grid has one more: its high half places the patch vertically, its
        # low half horizontally. A second number per cell, if needed, rotates and mirrors the patch.
        numbers = integers(keys, m * (1 + cells)).view(n * m, -1)
        d = low + (numbers[:, :1] * (high - low + 1) >> 32)
        if self.shuffle:
            top, left = _shuffled(numbers[:, 1:], d, height, width, across)
        else:
            top = (numbers[:, 1:] >> 16) * (height - d) >> 16
            left = (numbers[:, 1:] & 0xFFFF) * (width - d) >> 16
        corner = top * width + left
        as_they_are = not (self.flips or self.rotations)
        if as_they_are and query.device.type == "cpu" and min(height, width) >= self.copies_rows_from:
            return _row_by_row(query, corner.view(-1, down, across), d[:, 0].tolist())
        row, column = torch.arange(height, device=d.device), torch.arange(width, device=d.device)
        cell = (row // d * across)[:, :, None] + (column // d)[:, None]
        source = corner.gather(1, cell.view(n * m, -1))
        if self.flips or self.rotations:
            turns = integers(keys, m * cells, first=m * (1 + cells)).view(n * m, -1).gather(1, cell.view(n * m, -1))
            source += self._turned(turns.view(cell.shape), row % d, column % d, d, width).view(n * m, -1)
        else:
            source += ((row % d * width)[:, :, None] + (column % d)[:, None]).view(n * m, -1)
        pixels = query.reshape(n, 1, c, -1).expand(-1, m, -1, -1)
        return pixels.gather(3, source.view(n, m, 1, -1).expand(-1, -1, c, -1)).view(n, m, c, height, width)

    def _turned(self, numbers: Tensor, row: Tensor, column: Tensor, d: Tensor, width: int) -> Tensor:
        """Return the source of each pixel in its patch, as an offset in the image: (B, H, W).

        The two highest bits of a patch's number are its quarter turns. The next bit says whether it is mirrored before
        that.

        Args:
            numbers: (B, H, W), number of each pixel's patch.
            row: (B, H), row of a pixel in its patch.
            column: (B, W), column of a pixel in its patch.
            d: (B, 1), side of the patches.
            width: of the image.
        """
        quarters = (numbers >> 30) * self.rotations
        mirrored = (numbers >> 29 & 1).bool() & self.flips
        y, x, last = row[:, :, None], column[:, None], (d - 1)[:, None]
        upright = quarters % 2 == 0
        y, x = torch.where(upright, y, x), torch.where(upright, x, y)
        y = torch.where(quarters >= 2, last - y, y)
        x = torch.where(((quarters == 1) | (quarters == 2)) ^ mirrored, last - x, x)
        return y * width + x


def _row_by_row(query: Tensor, corner: Tensor, sizes: list[int]) -> Tensor:
    """Build images from unchanged patches, by copying whole rows of patches.

    Args:
        query: (N, C, H, W).
        corner: int64 (N m, down, across), offset in the image at which the patch of each cell begins.
        sizes: d of each of the N m negatives. Those of one size are built together.
    """
    n, c, height, width = query.shape
    m = len(sizes) // n
    pixels, result = query.reshape(-1), query.new_empty(n, m, c, height, width)
    negatives = result.flatten(0, 1).unbind()
    row, plane = torch.arange(height), torch.arange(n * c).view(n, c, 1, 1) * height * width
    for d in set(sizes):
        chosen = [k for k, size in enumerate(sizes) if size == d]
        across = -(-width // d)
        start = corner[chosen, :, :across][:, row // d] + (row % d * width)[:, None]  # (chosen, H, across)
        start = start[:, None] + plane[[k // m for k in chosen]]  # (chosen, C, H, across)
        rows = pixels.unfold(0, d, 1).index_select(0, start.flatten()).view(*start.shape[:3], -1)
        for k, made in zip(chosen, rows[..., :width], strict=True):
            negatives[k].copy_(made)
    return result


def _shuffled(numbers: Tensor, d: Tensor, height: int, width: int, across: int) -> tuple[Tensor, Tensor]:
    """Return the top left corner of the patch in each cell, (B, cells), if each patch of the grid is used once.

    Args:
        numbers: (B, cells) random numbers for the cells of the finest grid.
        d: (B, 1).
        height, width: of the images.
        across: columns of the finest grid.
    """
    cell = torch.arange(numbers.shape[1], device=numbers.device)
    row, column = cell // across, cell % across
    down_d, across_d = -(-height // d), -(-width // d)
    unused = (row >= down_d) | (column >= across_d)
    # Sort the patches by their numbers. Those of the grid come first, and the k-th of them goes to its k-th cell.
    order = torch.where(unused, 2**32, numbers).argsort(dim=1, stable=True)
    patch = order.gather(1, torch.where(unused, 0, row * across_d + column))
    return torch.minimum(patch // across * d, height - d), torch.minimum(patch % across * d, width - d)
