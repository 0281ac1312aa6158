import pytest
import torch

from icl_msr.errors import UserError
from icl_msr.negatives import PatchNegatives
from icl_msr.randomness import integers, keys


def generator(**changes):
    config = {"count": 2, "smallest": 16, "largest": 72, "reference": 224, "alpha": 2.0, "repulsion": 0.25}
    return PatchNegatives(**config | changes)


def one_by_one(query, numbers, low, high, across):
    """The description, image by image: an n*d canvas of d x d patches, n = H // d + 1, cut to H x W."""
    _, _, height, width = query.shape
    results = []
    for image, negatives in zip(query, numbers.tolist(), strict=True):
        for draw in negatives:
            d = low + draw[0] * (high - low + 1) // 2**32
            rows = []
            for r in range(height // d + 1):
                cells = []
                for c in range(width // d + 1):
                    number = draw[1 + r * across + c]
                    y, x = number // 2**16 * (height - d) // 2**16, number % 2**16 * (width - d) // 2**16
                    cells.append(image[:, y : y + d, x : x + d])
                rows.append(torch.cat(cells, 2))
            results.append(torch.cat(rows, 1)[:, :height, :width])
    return torch.stack(results).view(len(query), -1, *query.shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 40), (2, 3)])
def test_equals_the_loop_of_the_description(height, width, dtype):
    patches, n, m = generator(count=3), 10, 3
    query = torch.arange(n * 3 * height * width).view(n, 3, height, width).to(dtype)
    key = keys(0, 4, torch.arange(n), 9)
    low, high = patches.sizes(min(height, width))
    down, across = height // low + 1, width // low + 1
    numbers = integers(key, m * (1 + down * across)).view(n, m, -1)
    ours = patches(query, key)
    assert ours.shape == (n, m, 3, height, width)
    assert ours.dtype == dtype
    assert torch.equal(ours, one_by_one(query, numbers, low, high, across))


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
