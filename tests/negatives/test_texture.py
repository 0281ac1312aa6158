import numpy as np
import pytest
import torch

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import integers, keys
from icl_msr.negatives import TextureNegatives
from icl_msr.negatives.texture import _least_path

CONFIG = {
    "count": 2,
    "example": 96,
    "block": 36,
    "overlap": 6,
    "reference": 224,
    "candidates": 20,
    "tolerance": 0.1,
    "alpha": 2.0,
    "alpha_mode": "exponent",
    "alpha_schedule": "constant",
    "repulsion": 0.25,
}


def generator(**changes):
    return TextureNegatives(**CONFIG | changes)


def pictures(n, height, width, seed=0):
    """Coarse whole numbers, with which every sum of squares is exact."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, 3, height, width), generator=random).float()


def least_path(error):
    """Column of the path in each row; from below, the leftmost of those with the least sum."""
    total = error.copy()
    for i in range(1, len(error)):
        for j in range(error.shape[1]):
            total[i, j] += total[i - 1, max(j - 1, 0) : j + 2].min()
    path = [int(total[-1].argmin())]
    for line in total[-2::-1]:
        first = max(path[-1] - 1, 0)
        path.append(first + int(line[first : path[-1] + 2].argmin()))
    return path[::-1]


def one_block_after_the_other(examples, choices, places, texture, height, width):
    """Quilting as Efros and Freeman tell it, of one image, from left to right and from the top down."""
    side = examples.shape[-1]
    block, overlap = texture.sizes(min(height, width))[1:]
    step, free = block - overlap, side - block + 1
    down, across = (-(-(s - overlap) // step) for s in (height, width))
    canvas = np.zeros((3, overlap + step * down, overlap + step * across), np.float32)
    laid = np.zeros(canvas.shape[1:], bool)
    for r in range(down):
        for c in range(across):
            where = (slice(r * step, r * step + block), slice(c * step, c * step + block))
            old, known = canvas[:, *where], laid[where]
            candidates = []
            for place in places[c + 2 * r]:
                e, y, x = place // free**2, place // free % free, place % free
                candidates.append(examples[e, :, y : y + block, x : x + block])
            errors = np.array([((new - old) ** 2 * known).sum() for new in candidates], np.float32)
            good = [new for new, e in zip(candidates, errors, strict=True) if e <= np.float32(1.1) * errors.min()]
            new = good[choices[r * across + c] * len(good) // 2**32]
            difference = ((new - old) ** 2).sum(0)
            keep = np.zeros((block, block), bool)
            if c > 0:
                for i, j in enumerate(least_path(difference[:, :overlap])):
                    keep[i, :j] = True
            if r > 0:
                for j, i in enumerate(least_path(difference[:overlap].T)):
                    keep[:i, j] = True
            canvas[:, *where] = np.where(keep, old, new)
            laid[where] = True
    return canvas[:, :height, :width]


def one_by_one(query, texture, key):
    n, _, height, width = query.shape
    m = texture.count
    side, block, overlap = texture.sizes(min(height, width))
    step = block - overlap
    down, across = (-(-(s - overlap) // step) for s in (height, width))
    waves = across + 2 * (down - 1)
    spots = integers(key, m).tolist()
    slots = down * across + waves * texture.candidates
    numbers = integers(key, m * slots, first=m).view(n, m, slots).tolist()
    results = []
    for i, image in enumerate(query.numpy()):
        for j in range(m):
            high, low = spots[i][j] // 2**16, spots[i][j] % 2**16
            y, x = high * (height - side + 1) // 2**16, low * (width - side + 1) // 2**16
            corners = (((height - side) // 2, (width - side) // 2), (y, x))
            examples = np.stack([image[:, y : y + side, x : x + side] for y, x in corners])
            choices, drawn = numbers[i][j][: down * across], np.array(numbers[i][j][down * across :])
            places = (drawn * 2 * (side - block + 1) ** 2 // 2**32).reshape(waves, -1).tolist()
            results.append(one_block_after_the_other(examples, choices, places, texture, height, width))
    return torch.from_numpy(np.stack(results)).view(n, m, *query.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (33, 47), (64, 40), (13, 9), (5, 5)])
@pytest.mark.parametrize("candidates", [20, 150])  # a few of the places; about as many as there are, at 33 and 40 px
def test_equals_quilting_block_after_block(candidates, height, width, dtype):
    query, key, texture = pictures(3, height, width), keys(0, 4, torch.arange(3), 9), generator(candidates=candidates)
    ours = texture(query.to(dtype), key)
    assert ours.dtype == dtype
    assert torch.equal(ours.float(), one_by_one(query, texture, key))
    assert torch.equal(texture(query.to(dtype).contiguous(memory_format=torch.channels_last), key), ours)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_least_path(rows):
    error = torch.randint(0, 6, (2, 5, rows, 4), generator=torch.Generator().manual_seed(0)).float()
    ours = _least_path(error).flatten(0, 1)
    expected = torch.tensor([least_path(e) for e in error.flatten(0, 1).numpy()])
    assert torch.equal(ours, expected)
    assert (ours.diff(dim=1).abs() <= 1).all()


def test_no_path_is_better():
    """Against all paths, one by one."""
    error = torch.randint(0, 9, (6, 5, 3), generator=torch.Generator().manual_seed(1)).float()
    steps = torch.cartesian_prod(*[torch.arange(3)] * 5)
    steps = steps[(steps.diff(dim=1).abs() <= 1).all(1)]
    for e, path in zip(error, _least_path(error), strict=True):
        line = torch.arange(5)
        assert e[line, path].sum() == e[line, steps].sum(1).min()


def test_a_texture_has_the_pixels_of_its_examples_alone():
    query = torch.arange(2 * 64 * 64).float().view(2, 1, 64, 64)
    texture, key = generator(count=3), keys(0, 0, torch.arange(2), 9)
    examples = texture.examples(query, key, texture.sizes(64)[0])
    assert examples.shape == (2, 4, 1, 27, 27)
    assert torch.equal(examples[:, 0], query[:, :, 18:45, 18:45])  # the centre
    for i, negatives in enumerate(texture(query, key)):
        for j, negative in enumerate(negatives):
            assert torch.isin(negative, examples[i, [0, 1 + j]]).all()


def test_the_second_example_is_anywhere():
    n, side = 20_000, 7
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    query = torch.stack([rows, columns]).expand(n, 2, side, side)
    places = generator(count=1).examples(query, keys(0, 0, torch.arange(n), 9), 3)[:, 1, :, 0, 0]
    count = torch.bincount(places[:, 0] * 5 + places[:, 1], minlength=25).float()
    assert len(count) == 25
    assert ((count - n / 25) ** 2 / (n / 25)).sum() < 24 + 4 * 48**0.5


def test_a_negative_does_not_depend_on_the_batch():
    query, key = pictures(20, 32, 32), keys(0, 0, torch.arange(20), 9)
    whole = generator()(query, key)
    chosen = torch.tensor([17, 2])
    assert torch.equal(generator()(query[chosen], key[chosen]), whole[chosen])
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole, generator()(query, keys(0, 1, torch.arange(20), 9)))


def test_more_candidates_fit_better():
    """Of a smooth image, so that what differs between neighbours is the seams."""
    line = torch.linspace(0, 6.28, 64)
    query = (line.sin()[:, None] + line.cos())[None, None].expand(8, 3, -1, -1).contiguous()
    jumps = []
    for candidates in (1, 10, 100):
        shown = generator(count=1, candidates=candidates)(query, keys(0, 0, torch.arange(8), 9))[:, 0]
        jumps.append(float(shown.diff(dim=2).square().mean() + shown.diff(dim=3).square().mean()))
    assert jumps[0] > 2 * jumps[1] > 2.5 * jumps[2]


def test_sizes_scale_with_the_image():
    assert generator().sizes(224) == (96, 36, 6)
    assert generator().sizes(448) == (192, 72, 12)
    assert generator().sizes(32) == (14, 5, 2)
    assert generator().sizes(4) == (2, 2, 1)


@pytest.mark.parametrize("changes", [{"overlap": 20}, {"block": 100}, {"example": 300}])
def test_impossible_sizes(changes):
    with pytest.raises(UserError, match=r"2 negatives\.overlap <= negatives\.block"):
        generator(**changes)
