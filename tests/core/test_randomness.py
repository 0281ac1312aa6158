import math

import pytest
import torch

from icl_msr.core.randomness import integers, keys, permutation, uniforms


def test_recorded_numbers():
    assert keys(0, 0, torch.arange(3), 0).tolist() == [1765072993, 3146651686, 613433444]
    far = torch.tensor([0, 123456, 2**33 + 1])
    assert keys(2**40 + 5, 7, far, 3).tolist() == [2945356349, 297858937, 1508676518]
    assert integers(keys(0, 0, torch.arange(2), 0), 3).tolist() == [
        [3366426337, 3588376151, 1834648586],
        [875589963, 3730191901, 107432227],
    ]
    assert integers(keys(0, 0, torch.tensor([9]), 1), 2, first=100).tolist() == [[675873120, 3108409931]]
    assert uniforms(keys(0, 0, torch.arange(1), 0), 2).tolist() == [[0.7838071584701538, 0.8354839086532593]]
    assert permutation(0, 0, 10).tolist() == [7, 8, 2, 0, 6, 4, 5, 9, 3, 1]
    assert permutation(3, 2, 10).tolist() == [7, 3, 8, 1, 2, 5, 9, 6, 0, 4]


def test_mixer_is_lowbias32():
    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = 0
    for word in (11, 2, 5, 1):  # the seed's two halves, the epoch, the view
        key = (mix((key + word) % 2**32) + 0x9E3779B9) % 2**32
    for index in (0, 77, 2**32 + 3):
        expected = mix((mix(key ^ index % 2**32) + (index >> 32)) % 2**32)
        assert keys(11 + 2 * 2**32, 5, torch.tensor([index]), 1).item() == expected
        slots = [mix((mix(slot * 0x9E3779B9 % 2**32) + expected) % 2**32) for slot in range(40)]
        assert integers(torch.tensor([expected]), 40)[0].tolist() == slots


def chi_square(counts):
    """How many standard deviations the statistic of equally likely cells lies above its mean."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)).item()


@pytest.mark.parametrize(
    "numbers",
    [
        lambda: uniforms(keys(0, 0, torch.arange(20_000), 0), 20),
        lambda: uniforms(keys(0, 0, torch.arange(400_000), 1), 1),
        lambda: uniforms(keys(7, 3, torch.arange(2), 0), 200_000),
        lambda: torch.cat([uniforms(keys(0, e, torch.arange(20), 0), 2) for e in range(3000)]),
        lambda: torch.cat([uniforms(keys(s, 0, torch.arange(20), 0), 2) for s in range(3000)]),
    ],
    ids=["slots and indices", "indices", "slots", "epochs", "seeds"],
)
def test_uniform(numbers):
    u = numbers()
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert chi_square(torch.histc(u, 256, 0, 1)) < 5
    fine = u * 256 % 1  # bits 9 to 16
    assert chi_square(torch.histc(fine, 256, 0, 1)) < 5


def joint(a, b):
    return torch.bincount(((a * 16).long() * 16 + (b * 16).long()).flatten(), minlength=256).float()


def test_neighbours_are_independent():
    index = torch.arange(100_000)
    u = uniforms(keys(0, 0, index, 0), 4)
    pairs = {
        "slots": (u[:, 0], u[:, 1]),
        "distant slots": (u[:, 0], uniforms(keys(0, 0, index, 0), 1, first=36)[:, 0]),
        "views": (u, uniforms(keys(0, 0, index, 1), 4)),
        "epochs": (u, uniforms(keys(0, 1, index, 0), 4)),
        "epoch and view swapped": (uniforms(keys(0, 1, index, 0), 4), uniforms(keys(0, 0, index, 1), 4)),
        "seeds": (u, uniforms(keys(1, 0, index, 0), 4)),
        "indices": (u[1:], u[:-1]),
    }
    for name, (a, b) in pairs.items():
        assert chi_square(joint(a, b)) < 5, name


def test_uniforms_are_the_high_bits_of_the_integers():
    key = keys(0, 0, torch.arange(100), 0)
    assert torch.equal(uniforms(key, 100).double() * 2**24, (integers(key, 100) // 2**8).double())


def test_slots_continue():
    key = keys(0, 0, torch.arange(5), 0)
    assert torch.equal(integers(key, 10)[:, 4:], integers(key, 6, first=4))


def test_no_two_images_share_a_key():
    assert len(keys(0, 0, torch.arange(1_300_000), 0).unique()) == 1_300_000
    far = torch.tensor([5, 5 + 2**32])
    assert len(keys(0, 0, far, 0).unique()) == 2


def test_permutation():
    first, second = permutation(0, 0, 1000), permutation(0, 1, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, permutation(0, 0, 1000))
    for other in (second, permutation(1, 0, 1000), torch.arange(1000)):
        assert (first == other).sum() < 10
        assert abs(torch.corrcoef(torch.stack([first, other]).float())[0, 1]) < 0.15
