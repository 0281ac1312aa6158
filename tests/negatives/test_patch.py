import pytest
import torch

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers, keys
from icl_msr.negatives import PatchNegatives

CONFIG = {
    "count": 2,
    "smallest": 16,
    "largest": 72,
    "reference": 224,
    "shuffle": False,
    "flips": False,
    "rotations": False,
    "alpha": 2.0,
    "alpha_mode": "exponent",
    "alpha_schedule": "constant",
    "repulsion": 0.25,
}


def generator(**changes):
    return PatchNegatives(**CONFIG | changes)


def one_by_one(query, patches, key):
    """The description, image by image: an n*d canvas of d x d patches, n = H // d + 1, cut to H x W."""
    n, _, height, width = query.shape
    m = patches.count
    low, high = patches.sizes(min(height, width))
    across = width // low + 1
    cells = (height // low + 1) * across
    numbers = integers(key, m * (1 + 2 * cells)).tolist()
    results = []
    for image, draws in zip(query, numbers, strict=True):
        for j in range(m):
            draw, turns = draws[j * (1 + cells) :], draws[m * (1 + cells) + j * cells :]
            d = low + draw[0] * (high - low + 1) // 2**32
            grid = [(r, c) for r in range(-(-height // d)) for c in range(-(-width // d))]
            order = sorted(grid, key=lambda cell: draw[1 + cell[0] * across + cell[1]])
            used = dict(zip(grid, order, strict=True))
            rows = []
            for r in range(height // d + 1):
                row = []
                for c in range(width // d + 1):
                    number, turn = draw[1 + r * across + c], turns[r * across + c]
                    y, x = number // 2**16 * (height - d) // 2**16, number % 2**16 * (width - d) // 2**16
                    if patches.shuffle:  # a row or column that the cut takes away whole has no patch to show
                        y, x = (s * d for s in used.get((r, c), (0, 0)))
                        y, x = min(y, height - d), min(x, width - d)
                    patch = image[:, y : y + d, x : x + d]
                    if patches.flips and turn // 2**29 % 2:
                        patch = patch.flip(2)
                    if patches.rotations:
                        patch = torch.rot90(patch, turn // 2**30, (1, 2))
                    row.append(patch)
                rows.append(torch.cat(row, 2))
            results.append(torch.cat(rows, 1)[:, :height, :width])
    return torch.stack(results).view(n, m, *query.shape[1:])


VARIANTS = [(s, f, r) for s in (False, True) for f in (False, True) for r in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 40), (2, 3)])
@pytest.mark.parametrize(("shuffle", "flips", "rotations"), VARIANTS)
@pytest.mark.parametrize("rows_from", [0, 1000])
def test_equals_the_loop_of_the_description(rows_from, shuffle, flips, rotations, height, width, dtype):
    patches, n = generator(count=3, shuffle=shuffle, flips=flips, rotations=rotations), 4
    patches.copies_rows_from = rows_from
    query = torch.arange(n * 3 * height * width).view(n, 3, height, width).to(dtype)
    key = keys(0, 4, torch.arange(n), 9)
    ours = patches(query, key)
    assert ours.shape == (n, 3, 3, height, width)
    assert ours.dtype == dtype
    assert torch.equal(ours, one_by_one(query, patches, key))
    assert torch.equal(patches(query.contiguous(memory_format=torch.channels_last), key), ours)


def test_shuffled_patches_are_each_used_once():
    """Where d divides the side, a shuffled image has the pixels of the image, and with turned patches too."""
    query = torch.arange(6 * 3 * 32 * 32).view(6, 3, 32, 32)
    for turned in (False, True):
        patches = generator(smallest=8, largest=8, reference=32, shuffle=True, flips=turned, rotations=turned)
        ours = patches(query, keys(0, 0, torch.arange(6), 9))
        expected = query[:, None].expand_as(ours).flatten(3)
        assert torch.equal(ours.flatten(3).sort(3).values, expected)
        assert not torch.equal(ours.flatten(3), expected)


def test_turns_are_uniform():
    """A patch as large as all but one row and column shows by its first two pixels which of 8 ways it lies."""
    n, side = 16_000, 5
    patches = generator(count=1, smallest=4, largest=4, reference=5, flips=True, rotations=True)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    query = torch.stack([rows, columns]).expand(n, 2, side, side)
    shown = patches(query, keys(0, 0, torch.arange(n), 9))[:, 0]
    down, right = shown[:, :, 1, 0] - shown[:, :, 0, 0], shown[:, :, 0, 1] - shown[:, :, 0, 0]
    way = (down + 1) @ torch.tensor([3, 1]) * 9 + (right + 1) @ torch.tensor([3, 1])
    _, count = way.unique(return_counts=True)
    assert len(count) == 8
    assert ((count - n / 8) ** 2 / (n / 8)).sum() < 7 + 4 * 14**0.5


def test_sizes_scale_with_the_image():
    assert generator().sizes(224) == (16, 72)
    assert generator().sizes(32) == (2, 10)
    assert generator().sizes(2) == (1, 1)


def test_sizes_and_places_are_uniform():
    n, side = 30_000, 32
    patches = generator(count=1, smallest=4, largest=7, reference=32)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    query = torch.stack([rows, columns]).expand(n, 2, side, side)
    y, x = patches(query, keys(0, 0, torch.arange(n), 9))[:, 0].unbind(1)
    # The first patch ends where the column no longer grows by one, but for chance neighbours.
    breaks = x[:, 0, 1:] - x[:, 0, :-1] != 1
    d = breaks.int().argmax(1) + 1
    share = torch.stack([(d == k).float().mean() for k in range(4, 8)])
    assert (share - 0.25).abs().max() < 0.02
    for axis in (y, x):
        start = axis[:, 0, 0][d == 7]
        count = torch.bincount(start, minlength=side - 7).float()
        assert len(count) == side - 7  # half open: d = 7 never starts at 25
        expected = len(start) / (side - 7)
        assert ((count - expected) ** 2 / expected).sum() < 24 + 4 * 48**0.5
    assert abs(torch.corrcoef(torch.stack([y[:, 0, 0], x[:, 0, 0]]).float())[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([x[:, 0, 0], x[:, 0, 8]]).float())[0, 1]) < 0.06


def test_a_negative_does_not_depend_on_the_batch():
    query = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    key = keys(0, 0, torch.arange(40), 9)
    whole = generator()(query, key)
    chosen = torch.tensor([31, 2])
    assert torch.equal(generator()(query[chosen], key[chosen]), whole[chosen])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole, generator()(query, keys(0, 1, torch.arange(40), 9)))


@pytest.mark.parametrize("changes", [{"smallest": 80}, {"largest": 224}])
def test_impossible_sizes(changes):
    with pytest.raises(UserError, match=r"negatives\.smallest"):
        generator(**changes)
