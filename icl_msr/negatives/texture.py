"""Texture negatives: a texture synthesised from two pieces of an image (Ge et al. 2021, section 3), by image quilting.

Source of the algorithm: Efros and Freeman. Image Quilting for Texture Synthesis and Transfer. SIGGRAPH 2001.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers
from icl_msr.core.views import AlphaMode, AlphaSchedule

_PIXELS = 2**20
"""Number of pixels that a CPU works on at a time, so that the candidates fit into its cache."""


class TextureNegatives:
    """Sews together blocks of two examples: the centre of the image and a piece of it from a uniform position.

    Blocks are laid from left to right and from top to bottom, each over the edges of its neighbours. The error of a
    block is the sum of squared differences from these edges. Each block is drawn from `candidates` random blocks of
    both examples, among those whose error is at most 1 + `tolerance` times the smallest. It is cut out along the path
    of least difference.

    The paper's textures come from another program, offline, and from the raw image; see `icl_msr.textures` for that.
    Sizes are given for images of side `reference` and scale with the actual side.
    """

    def __init__(
        self,
        *,
        count: PositiveInt,
        example: PositiveInt,
        block: PositiveInt,
        overlap: PositiveInt,
        reference: PositiveInt,
        candidates: PositiveInt,
        tolerance: NonNegativeFloat,
        alpha: PositiveFloat,
        alpha_mode: AlphaMode,
        alpha_schedule: AlphaSchedule,
        repulsion: NonNegativeFloat,
    ) -> None:
        if not 2 * overlap <= block <= example <= reference:
            raise UserError(
                f"blocks of {block} pixels with edges of {overlap} from examples of {example} do not fit: choose "
                f"2 negatives.overlap <= negatives.block <= negatives.example <= negatives.reference, which is "
                f"{reference}."
            )
        self.count = count
        self.example, self.block, self.overlap, self.reference = example, block, overlap, reference
        self.candidates, self.tolerance = candidates, tolerance
        # The losses read these; see `icl_msr.core.views.NonSemantic`.
        self.alpha, self.alpha_mode, self.alpha_schedule = alpha, alpha_mode, alpha_schedule
        self.repulsion = repulsion

    def sizes(self, side: int) -> tuple[int, int, int]:
        """Return the sides of example, block and overlap, in pixels, for images whose shorter side is `side`."""
        example, block, overlap = (round(s * side / self.reference) for s in (self.example, self.block, self.overlap))
        example = min(max(example, 2), side)
        block = min(max(block, 4), example)
        return example, block, min(max(overlap, 2), block // 2)

    def __call__(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return m negatives of each image, (N, m, C, H, W).

        Args:
            query: (N, C, H, W) of any dtype, usually the first view, augmented and normalised; H and W at least 2.
            keys: int64 (N,), from `icl_msr.core.randomness.keys`, on the device of the images.
        """
        height, width = query.shape[2:]
        examples = self.examples(query, keys, self.sizes(min(height, width))[0])
        return self.quilt(examples, keys, height, width)

    def examples(self, images: Tensor, keys: Tensor, side: int) -> Tensor:
        """Return the centre of each image and m pieces from uniform positions, (N, 1 + m, C, side, side).

        Args:
            images: (N, C, H, W), with H and W at least `side`.
            keys: int64 (N,).
            side: in pixels.
        """
        height, width = images.shape[2:]
        numbers = integers(keys, self.count)
        top = (numbers >> 16) * (height - side + 1) >> 16
        left = (numbers & 0xFFFF) * (width - side + 1) >> 16
        top = F.pad(top, (1, 0), value=(height - side) // 2)
        left = F.pad(left, (1, 0), value=(width - side) // 2)
        n, c = images.shape[:2]
        plane = torch.arange(n * c, device=images.device).view(n, 1, c, 1) * height
        row = plane + top[..., None, None] + torch.arange(side, device=images.device)  # (N, 1 + m, C, side)
        first = row * width + left[..., None, None]
        rows = images.reshape(-1).unfold(0, side, 1).index_select(0, first.flatten())
        return rows.view(*first.shape, side)

    @torch.no_grad()
    def quilt(self, examples: Tensor, keys: Tensor, height: int, width: int) -> Tensor:
        """Return textures (N, m, C, height, width) from examples. Each is made of the first example and its own.

        Args:
            examples: (N, 1 + m, C, p, p), from `examples`.
            keys: int64 (N,).
            height, width: of the textures, in pixels.
        """
        n, _, c, side, _ = examples.shape
        _, block, overlap = self.sizes(min(height, width))
        plan = _Plan(height, width, min(block, side), min(overlap, side // 2), c)
        places = 2 * (side - plan.block + 1) ** 2
        pairs = torch.stack([examples[:, :1].expand(-1, self.count, -1, -1, -1), examples[:, 1:]], 2).flatten(0, 1)
        slots = plan.down * plan.across + len(plan) * self.candidates
        numbers = integers(keys, self.count * slots, first=self.count).view(n * self.count, slots)
        choices, drawn = numbers[:, : plan.down * plan.across], numbers[:, plan.down * plan.across :]
        drawn = (drawn * places >> 32).view(-1, len(plan), self.candidates)
        textures = examples.new_empty(n * self.count, height, width, c)
        step = max(1, _PIXELS // (height * width)) if examples.device.type == "cpu" else len(pairs)
        with torch.autocast(examples.device.type, enabled=False):
            for k in range(0, len(pairs), step):
                part = slice(k, k + step)
                sewn = _sew(plan, pairs[part].float(), choices[part], drawn[part], self.tolerance)
                textures[part] = sewn[:, :height, :width]
        return textures.view(n, self.count, height, width, c).movedim(4, 2)


@dataclass
class _Plan:
    """The places of the blocks and the order in which they are laid, in waves.

    A block needs its left neighbour and the three above it. So the blocks (row, column) with column + 2 row = t can be
    laid at the same time, after those of smaller t. The result is the same as for one after the other. In memory the
    blocks of a wave are evenly spaced, so that one strided view of the canvas reads and writes them.
    """

    height: int
    width: int
    block: int
    overlap: int
    channels: int

    def __post_init__(self) -> None:
        self.step = self.block - self.overlap
        self.down, self.across = (max(1, -(-(s - self.overlap) // self.step)) for s in (self.height, self.width))

    def __len__(self) -> int:
        """Return the number of waves."""
        return self.across + 2 * (self.down - 1)

    def canvas(self) -> tuple[int, int]:
        """Height and width that the blocks cover, in pixels."""
        return self.overlap + self.step * self.down, self.overlap + self.step * self.across

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the blocks (row, column) of each wave, from the top right to the bottom left."""
        for t in range(len(self)):
            rows = range(max(0, -(-(t - self.across + 1) // 2)), min(self.down - 1, t // 2) + 1)
            yield [(row, t - 2 * row) for row in rows]

    def blocks(self, canvas: Tensor, wave: list[tuple[int, int]]) -> Tensor:
        """Return a wave's blocks (B, n, block, block, channels), a view of a contiguous canvas (B, h, w, channels)."""
        (row, column), (_, width, channels) = wave[0], canvas.shape[1:]
        line = width * channels
        strides = (canvas.stride(0), self.step * (line - 2 * channels), line, channels, 1)
        shape = (len(canvas), len(wave), self.block, self.block, channels)
        return canvas.as_strided(shape, strides, self.step * (row * line + column * channels))


def _sew(plan: _Plan, examples: Tensor, choices: Tensor, places: Tensor, tolerance: float) -> Tensor:
    """Return canvases (B, h, w, C) that are at least as large as the plan asks.

    Args:
        plan: places and order of the blocks.
        examples: float (B, 2, C, p, p).
        choices: int64 (B, blocks), a number below 2^32 for each block, in rows.
        places: int64 (B, waves, K), the places of a wave's candidates. One number holds example, row and column.
        tolerance: see `TextureNegatives`.
    """
    o, source = plan.overlap, _Source(examples, plan, places.shape[2])
    canvas = examples.new_zeros(len(examples), *plan.canvas(), plan.channels)
    for wave, candidates in zip(plan, places.unbind(1), strict=True):
        there = plan.blocks(canvas, wave)
        upper, left = (edge.clone() for edge in _edges(there, o))  # zero where no block was laid yet
        # The first row of blocks has no blocks above it, and the first column none beside it.
        k = torch.arange(len(wave), device=canvas.device)
        above, beside = wave[0][0] + k > 0, wave[0][1] - 2 * k > 0
        error = source.errors(upper, left, above, beside, candidates)
        number = torch.stack([choices[:, r * plan.across + s] for r, s in wave], 1)
        new = source.blocks(candidates.gather(1, _choose(error, number, tolerance)))
        # Each block is cut out along two paths of least difference, in its upper and its left edge.
        apart = [(edge - before).square().sum(4) for edge, before in zip(_edges(new, o), (upper, left), strict=True)]
        path = _least_path(torch.stack(apart, 2).mT) * torch.stack([above, beside], 1)[:, :, None]  # (B, n, 2, b)
        keep = torch.arange(o, device=path.device)[:, None] < path[..., None, :]  # (B, n, 2, o, b)
        for edge, before, mine in zip(_edges(new, o), (upper, left), keep.unbind(2), strict=True):
            edge.copy_(torch.where(mine[..., None], before, edge))
        there.copy_(new)
    return canvas


def _edges(blocks: Tensor, overlap: int) -> tuple[Tensor, Tensor]:
    """Return the upper edges of blocks (B, n, b, b, C) and their transposed left edges: views (B, n, overlap, b, C)."""
    return blocks[:, :, :overlap], blocks[:, :, :, :overlap].transpose(2, 3)


class _Source:
    """The blocks of the two examples of B pictures. A place is one number that holds example, row and column."""

    def __init__(self, examples: Tensor, plan: _Plan, candidates: int) -> None:
        b, o = self.b, self.o = plan.block, plan.overlap
        count, _, self.c, self.side, _ = examples.shape
        free = self.side - b + 1
        # Channels are last. A transposed copy makes the columns of a block contiguous in memory, as its rows are.
        self.lines = [examples.permute(0, 1, *order).reshape(-1) for order in ((3, 4, 2), (4, 3, 2))]
        of_image = torch.arange(count, device=examples.device)[:, None] * 2 * self.side**2
        # The index of the first pixel of each place, (B, 2 free^2).
        pixel = torch.arange(2 * self.side**2, device=examples.device).view(2, self.side, self.side)
        corners = pixel[:, :free, :free]
        self.corners = [of_image + of.reshape(-1) for of in (corners, corners.mT)]
        energy = examples.square().sum(2)
        parts = (_sums(energy, o, b), _sums(energy, o, o), _sums(energy[:, :, o:], b - o, o))
        # Squares of the upper edge, of the corner in it, and of the left edge below: (B, 3, places).
        self.squares = torch.stack([part[:, :, :free, :free].flatten(1) for part in parts], 1)
        # If most places are candidates, all are compared, and nothing is copied for each wave.
        every = torch.arange(2 * free**2, device=examples.device).expand(count, -1)
        self.all_edges = None
        if len(every[0]) <= 2 * candidates:
            self.all_edges = torch.cat(self.edges(every), 2).mT.contiguous()

    def edges(self, places: Tensor) -> list[Tensor]:
        """Return the pixels of the blocks' upper edges, and of their left edges below: two of (B, K, pixels)."""
        b, o = self.b, self.o
        return [self._cut(0, places, o, 0, b).flatten(2), self._cut(1, places, o, o, b - o).flatten(2)]

    def blocks(self, places: Tensor) -> Tensor:
        """Return the blocks (B, n, b, b, C) at these places (B, n)."""
        return self._cut(0, places, self.b, 0, self.b)

    def _cut(self, turned: int, places: Tensor, rows: int, first: int, columns: int) -> Tensor:
        """Return the first rows of (transposed) blocks, from column `first` on: (B, K, rows, columns, C)."""
        corner = self.corners[turned].gather(1, places) + first
        row = torch.arange(rows, device=places.device) * self.side
        index = (corner[..., None] + row) * self.c
        pieces = self.lines[turned].unfold(0, columns * self.c, 1).index_select(0, index.flatten())
        return pieces.view(*index.shape, columns, self.c)

    def errors(self, upper: Tensor, left: Tensor, above: Tensor, beside: Tensor, places: Tensor) -> Tensor:
        """Return the sums of squared differences (B, n, K) between K candidates and the canvas at n places.

        Args:
            upper, left: (B, n, o, b, C), the edges of the n places on the canvas.
            above, beside: bool (n,), True if a block lies there.
            places: int64 (B, K), the candidates.
        """
        known = [upper.flatten(2), left[:, :, :, self.o :].flatten(2)]
        if self.all_edges is None:
            edges, squares = [edge.mT for edge in self.edges(places)], _take(self.squares, places)
        else:
            known, edges, squares = [torch.cat(known, 2)], [self.all_edges], self.squares
        # The squares are expanded, so that most of the work is a matrix product.
        error = torch.stack([above, beside & ~above, beside], 1).float() @ squares
        for pixels, edge in zip(known, edges, strict=True):
            error += pixels.square().sum(2, keepdim=True)
            error.baddbmm_(pixels, edge, alpha=-2)
        return error if self.all_edges is None else _take(error, places)


def _take(values: Tensor, places: Tensor) -> Tensor:
    """Return the values (B, n, K) at the places (B, K), from values (B, n, P)."""
    return values.gather(2, places[:, None].expand(-1, values.shape[1], -1))


def _sums(energy: Tensor, height: int, width: int) -> Tensor:
    """Return sums over every window of that size: (..., h, w) to (..., h - height + 1, w - width + 1)."""
    return energy.unfold(-2, height, 1).sum(-1).unfold(-1, width, 1).sum(-1)


def _choose(error: Tensor, number: Tensor, tolerance: float) -> Tensor:
    """Return a good candidate (B, n) for each block, at random; error (B, n, K), number int64 (B, n) below 2^32."""
    error = error.clamp(min=0)  # rounding can make it negative
    good = (error <= (1 + tolerance) * error.amin(2, keepdim=True)).cumsum(2, dtype=torch.int32)
    # The first candidate up to which there are as many good ones.
    wanted = (number * good[..., -1] >> 32).int() + 1
    return torch.searchsorted(good, wanted[..., None])[..., 0]


def _least_path(error: Tensor) -> Tensor:
    """Return the path from the first row to the last with the least sum: its column in each row, int64 (..., rows).

    From row to row a path moves by at most one column. Error is (..., rows, columns). Of equal paths the leftmost is
    taken.
    """
    *batch, rows, columns = error.shape
    gain = -error.reshape(-1, rows, columns)
    best, back = gain[:, 0], []
    for i in range(1, rows):
        best, before = F.max_pool1d(best, 3, 1, 1, return_indices=True)
        best = best + gain[:, i]
        back.append(before)
    path = [best.argmax(1, keepdim=True)]
    for before in reversed(back):
        path.append(before.gather(1, path[-1]))
    return torch.cat(path[::-1], 1).view(*batch, rows)
