import numpy as np
import torch

from icl_msr.evaluation.metrics import Bootstrap


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        _, low, high = Bootstrap(400, seed=trial).mean(torch.rand(200, generator=generator) < 0.7)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.985


def test_width_is_that_of_the_normal_approximation() -> None:
    values = torch.arange(2000) % 4 == 0
    value, low, high = Bootstrap(2000, seed=0).mean(values)
    assert value == 0.25
    np.testing.assert_allclose((high - low) / 2, 1.96 * (0.25 * 0.75 / 2000) ** 0.5, rtol=0.08)


def test_pairing_narrows_the_difference_of_agreeing_splits() -> None:
    first = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 0.6
    second = first.clone()
    second[:50] = False
    bootstrap = Bootstrap(1000, seed=0)
    paired = bootstrap.difference(first, second, paired=True)
    unpaired = bootstrap.difference(first, second, paired=False)
    assert abs(paired.value - unpaired.value) < 1e-6
    assert unpaired.high - unpaired.low > 2 * (paired.high - paired.low)
    expected = 1.96 * (2 * 0.6 * 0.4 / 1000) ** 0.5
    np.testing.assert_allclose((unpaired.high - unpaired.low) / 2, expected, rtol=0.12)
    assert bootstrap.difference(first, second[:900], paired=False).value > -1


def test_same_seed_same_interval() -> None:
    values = torch.arange(100) % 3 == 0
    assert Bootstrap(100, seed=1).mean(values) == Bootstrap(100, seed=1).mean(values)
    assert Bootstrap(100, seed=1).mean(values) != Bootstrap(100, seed=2).mean(values)
