"""Against lightly, against the papers' formulas written out slowly, and against the finite-difference gradient."""

import math

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from torch import Tensor

from icl_msr.losses.decorrelation import BARLOW_EPSILON, VICREG_EPSILON, barlow_twins, vicreg

N, D = 9, 5


def random(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows whose dimensions have deviations on both sides of 1, means beside 0, and correlations."""
    rows = torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows @ torch.full((D, D), 0.2).add(torch.linspace(0.2, 1.5, D).diag()).double() + 0.7).to(dtype)


A, B = random(0), random(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("off_diagonal", [5e-3, 0.4])
def test_barlow_twins_equals_lightly(off_diagonal: float, dtype: torch.dtype) -> None:
    theirs = BarlowTwinsLoss(off_diagonal)(A.to(dtype), B.to(dtype))
    torch.testing.assert_close(barlow_twins(A.to(dtype), B.to(dtype), off_diagonal), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_vicreg_equals_lightly(weights: tuple[float, float, float], dtype: torch.dtype) -> None:
    theirs = VICRegLoss(*weights)(A.to(dtype), B.to(dtype))
    torch.testing.assert_close(vicreg(A.to(dtype), B.to(dtype), *weights), theirs)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def columns(rows: Tensor) -> list[list[float]]:
    """Centred, as plain numbers."""
    return [[x - mean(column) for x in column] for column in rows.T.tolist()]


def test_barlow_twins_follows_the_formula() -> None:
    a, b = columns(A), columns(B)
    total = 0.0
    for i in range(D):
        for j in range(D):
            deviations = math.sqrt(mean([x * x for x in a[i]]) + BARLOW_EPSILON)
            deviations *= math.sqrt(mean([y * y for y in b[j]]) + BARLOW_EPSILON)
            c = mean([x * y for x, y in zip(a[i], b[j], strict=True)]) / deviations
            total += (1 - c) ** 2 if i == j else 0.3 * c**2
    assert float(barlow_twins(A, B, 0.3)) == pytest.approx(total, rel=1e-12)


def test_vicreg_follows_the_formula() -> None:
    total = 7 * mean([(x - y) ** 2 for x, y in zip(A.flatten().tolist(), B.flatten().tolist(), strict=True)])
    for z in (columns(A), columns(B)):
        for i in range(D):
            for j in range(D):
                c = sum(x * y for x, y in zip(z[i], z[j], strict=True)) / (N - 1)
                if i == j:
                    total += 5 * max(0, 1 - math.sqrt(c + VICREG_EPSILON)) / D / 2
                else:
                    total += 3 * c**2 / D
    assert float(vicreg(A, B, 7, 5, 3)) == pytest.approx(total, rel=1e-12)


def uncorrelated() -> Tensor:
    """Centred orthogonal columns with a variance of 1 (over N - 1)."""
    q = torch.linalg.qr(A - A.mean(0)).Q
    return q * math.sqrt(N - 1)


def test_uncorrelated_dimensions_that_agree_leave_no_loss() -> None:
    z = uncorrelated()
    assert float(barlow_twins(z, z, 0.005)) < D * 4 * BARLOW_EPSILON**2  # a variance is at least (N - 1) / N > 1/2
    assert float(vicreg(z, z, 25, 25, 1)) < 1e-25
    assert float(barlow_twins(z, z[:, [1, 0, 2, 3, 4]], 0.005)) == pytest.approx(2 + 2 * 0.005, rel=1e-3)


def test_barlow_twins_sees_no_scale_and_no_offset() -> None:
    # So large that the epsilon does not count; lightly's own loss has the same limit.
    first, second = 1e4 * A, 1e4 * B
    moved = first * torch.tensor([3.0, -3.0, 0.5, 2.0, 1.0]) + 5
    signs = second * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(barlow_twins(moved, signs, 0.1), barlow_twins(first, second, 0.1))


def test_vicreg_of_a_collapsed_embedding_is_the_full_hinge() -> None:
    constant = torch.ones(N, D, dtype=torch.float64, requires_grad=True)
    loss = vicreg(constant, constant, 25, 25, 1)
    assert float(loss.detach()) == pytest.approx(25 * (1 - math.sqrt(VICREG_EPSILON)))
    (gradient,) = torch.autograd.grad(loss, constant)
    assert gradient.isfinite().all()


def test_gradients() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: barlow_twins(x, y, 0.3), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: vicreg(x, y, 25, 25, 1), (a, b))


def test_half_precision_is_computed_in_single() -> None:
    a, b = A.bfloat16(), B.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [barlow_twins(a, b, 0.3), vicreg(a, b, 25, 25, 1)]
    expected = [barlow_twins(a.float(), b.float(), 0.3), vicreg(a.float(), b.float(), 25, 25, 1)]
    for found, loss in zip(losses, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss, rtol=0, atol=0)
