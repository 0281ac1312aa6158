"""Against definitions written out pair by pair, and on features whose values are known."""

import math

import pytest
import torch
from torch import Tensor

from icl_msr.evaluation.health import alignment, effective_rank, feature_std, linear_cka, spread


@pytest.fixture
def features() -> Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1)
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected)


def test_feature_std() -> None:
    assert feature_std(torch.ones(9, 4)) == pytest.approx(0)
    many = torch.randn(20000, 8, generator=torch.Generator().manual_seed(0))
    assert feature_std(many) == pytest.approx(1, abs=0.01)


def test_alignment_and_spread_pair_by_pair(features: Tensor) -> None:
    other = features + 0.1
    u, v = (torch.nn.functional.normalize(f.double(), dim=1) for f in (features, other))
    distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(u, v, strict=True)]
    assert alignment(features, other) == pytest.approx(sum(distances) / 40)
    pairs = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(40) for j in range(40) if i != j]
    assert spread(features) == pytest.approx(math.log(sum(pairs) / len(pairs)))


def test_cka_sees_the_same_in_rotated_and_scaled_features(features: Tensor) -> None:
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(features, 3 * features @ rotation + 5) == pytest.approx(1, abs=1e-5)
    x = features.double() - features.double().mean(0)
    gram, other = x @ x.T, torch.randn(40, 2, generator=torch.Generator().manual_seed(2)).double()
    y = other - other.mean(0)
    expected = (gram * (y @ y.T)).sum() / (gram.norm() * (y @ y.T).norm())
    assert linear_cka(features, other) == pytest.approx(float(expected))
