"""Patch negatives: an image rebuilt from small patches of itself at random places (Ge et al. 2021, section 3)."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers
from icl_msr.core.views import AlphaMode, AlphaSchedule


class PatchNegatives:
    """Tiles a canvas with d x d patches of the image, each from a place of its own, and cuts it to the image's size.

    Every negative of every image has its own d, uniform over the integers from `smallest` to `largest`, which are
    given for images of side `reference` and scale with the actual one. In the paper patches are neither flipped nor
    rotated and may overlap.

    Variants (ours): with `shuffle` the patches are those of a grid on the image, each used once, in random order
    (where d does not divide the side, the last ones of the grid reach back, and the canvas cuts what it has in the
    place of the last ones); with `flips` half of the patches are mirrored, left and right; with `rotations` each is
    turned by 0, 90, 180 or 270 degrees.
    """

    copies_rows_from = 64
    """Side in pixels from which a CPU copies rows of patches; smaller images, and other devices, pick single pixels."""

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
        # What the losses read; see `icl_msr.core.views.NonSemantic`.
        self.alpha, self.alpha_mode, self.alpha_schedule = alpha, alpha_mode, alpha_schedule
        self.repulsion = repulsion

    def sizes(self, side: int) -> tuple[int, int]:
        """Smallest and largest d, in pixels, for images whose shorter side is `side`."""
        low, high = (round(d * side / self.reference) for d in (self.smallest, self.largest))
        return min(max(low, 1), side - 1), min(max(high, 1), side - 1)

    def __call__(self, query: Tensor, keys: Tensor) -> Tensor:
        """m negatives (N, m, C, H, W) of each image.

        Args:
            query: (N, C, H, W) of any dtype, usually the first view, augmented and normalised; H and W at least 2.
            keys: int64 (N,), from `icl_msr.core.randomness.keys`, on the device of the images.
        """
        n, c, height, width = query.shape
        m = self.count
        low, high = self.sizes(min(height, width))
        down, across = height // low + 1, width // low + 1
        cells = down * across
        # One number for d and one for each cell of the finest grid: its high half places the patch vertically, its
        # low half horizontally; a second one, if it is needed, turns it.
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
        """Where in its patch each pixel comes from, as an offset in the image: (B, H, W).

        The two highest bits of a patch's number say how many quarter turns it takes, the next one whether it is
        mirrored before.

        Args:
            numbers: (B, H, W), that of each pixel's patch.
            row: (B, H), of a pixel in its patch.
            column: (B, W), likewise.
            d: (B, 1).
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
    """Images from patches as they are; a row of a patch is one piece of memory.

    Args:
        query: (N, C, H, W).
        corner: int64 (N m, down, across), where in its image the patch of each cell begins, row after row.
        sizes: d of each of the N m negatives; those of one size are made together.
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
    """The top left corner of the patch in each cell, (B, cells), when each patch of the grid is used once.

    Args:
        numbers: (B, cells) for the cells of the finest grid, which has `across` columns.
        d: (B, 1).
        height, width: of the images.
        across: see above.
    """
    cell = torch.arange(numbers.shape[1], device=numbers.device)
    row, column = cell // across, cell % across
    down_d, across_d = -(-height // d), -(-width // d)
    unused = (row >= down_d) | (column >= across_d)
    # The patches by their numbers; those of the grid come first, and the k-th of them goes to its k-th cell.
    order = torch.where(unused, 2**32, numbers).argsort(dim=1, stable=True)
    patch = order.gather(1, torch.where(unused, 0, row * across_d + column))
    return torch.minimum(patch // across * d, height - d), torch.minimum(patch % across * d, width - d)
