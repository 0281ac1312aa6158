"""Against lightly, against Cholesky's algorithm written out, and against the finite-difference gradient."""

import math

import pytest
import torch
from lightly.loss.wmse_loss import Whitening2d, WMSELoss
from torch import Tensor

from icl_msr.losses.regression import squared_distance
from icl_msr.losses.whitening import partition, whiten, wmse

M, D = 24, 3


def random(seed: int, n: int = M, d: int = D) -> Tensor:
    """Correlated rows with a mean beside 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 2


A, B = random(0), random(1)


def covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.T)


def test_whitened_rows_have_mean_zero_and_covariance_one() -> None:
    rows = whiten(A, 0.0)
    torch.testing.assert_close(rows.mean(0), torch.zeros(D, dtype=torch.float64))
    torch.testing.assert_close(covariance(rows), torch.eye(D, dtype=torch.float64))


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_whitening_equals_lightly(shrinkage: float) -> None:
    theirs = Whitening2d(D, track_running_stats=False, eps=shrinkage)
    torch.testing.assert_close(whiten(A, shrinkage), theirs(A))
    torch.testing.assert_close(whiten(torch.stack([A, B]), shrinkage), torch.stack([theirs(A), theirs(B)]))


def test_a_triangular_map_before_the_whitening_changes_nothing() -> None:
    lower = torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [-3, 4, 1]], dtype=torch.float64)
    torch.testing.assert_close(whiten(A @ lower.T + 7, 0.0), whiten(A, 0.0))


def test_ill_conditioned_rows_in_single_precision() -> None:
    """Two dimensions are all but equal: the covariance's condition is 1e9, which is more than fp32 can hold."""
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows[:, 1] = rows[:, 0] + 1e-4 * rows[:, 1]
    assert torch.linalg.cond(covariance(rows)) > 1e8
    single = rows.float().requires_grad_()
    whitened = whiten(single, 0.0)
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(covariance(whitened), torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(whitened.double(), whiten(rows, 0.0), rtol=0, atol=0.01)  # what rounding the rows costs
    (gradient,) = torch.autograd.grad(whitened.sin().sum(), single)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("images", "size", "sizes"), [(24, 8, [8] * 3), (24, 24, [24]), (23, 5, [6, 6, 6, 5])])
def test_partition_puts_every_image_in_one_sub_batch(images: int, size: int, sizes: list[int]) -> None:
    parts = partition(images, size, 2, step=3)
    assert [len(part) for part in parts] == 2 * sizes
    for half in (parts[: len(sizes)], parts[len(sizes) :]):
        assert torch.equal(torch.cat(half).sort().values, torch.arange(images))


def test_partition_is_a_function_of_step_and_iteration() -> None:
    first, again, later = (torch.stack(partition(24, 8, 2, step)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first[:3], first[3:])


@pytest.mark.parametrize("views", [[A, B], [A, B, A + 0.3 * B, B - 0.1 * A]])
@pytest.mark.parametrize(("size", "iterations"), [(24, 1), (8, 1), (8, 3), (6, 2)])
def test_wmse_equals_lightly(size: int, iterations: int, views: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """W-MSE 2 and W-MSE 4."""
    parts = partition(M, size, iterations, step=5)
    orders = iter(torch.cat(parts).split(M))
    monkeypatch.setattr(torch, "randperm", lambda n: next(orders))
    theirs = WMSELoss(D, eps=0.01, track_running_stats=False, w_iter=iterations, w_size=size, num_samples=len(views))
    torch.testing.assert_close(wmse(torch.stack(views), parts, 0.01), theirs(torch.cat(views)).double())


def slow_whitening(rows: list[list[float]], shrinkage: float) -> list[list[float]]:
    """Covariance, Cholesky's algorithm and forward substitution, number by number."""
    n = len(rows)
    means = [sum(row[i] for row in rows) / n for i in range(D)]
    rows = [[row[i] - means[i] for i in range(D)] for row in rows]
    factor = [[0.0] * D for _ in range(D)]
    for i in range(D):
        for j in range(i + 1):
            entry = (1 - shrinkage) * sum(row[i] * row[j] for row in rows) / (n - 1) + shrinkage * (i == j)
            entry -= sum(factor[i][k] * factor[j][k] for k in range(j))
            factor[i][j] = math.sqrt(entry) if i == j else entry / factor[j][j]
    for row in rows:
        for i in range(D):
            row[i] = (row[i] - sum(factor[i][k] * row[k] for k in range(i))) / factor[i][i]
    return rows


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_wmse_follows_the_algorithm(shrinkage: float) -> None:
    """Also where the sub-batches differ in size: every image counts the same."""
    first, second, distances = A[:23], B[:23], []
    parts = partition(23, 7, 2, step=1)
    assert [len(part) for part in parts] == [8, 8, 7] * 2
    for part in parts:
        a, b = (slow_whitening(view[part].tolist(), shrinkage) for view in (first, second))
        for x, y in zip(a, b, strict=True):
            lengths = math.sqrt(sum(p * p for p in x)) * math.sqrt(sum(q * q for q in y))
            distances.append(2 - 2 * sum(p * q for p, q in zip(x, y, strict=True)) / lengths)
    assert float(wmse(torch.stack([first, second]), parts, shrinkage)) == pytest.approx(
        sum(distances) / len(distances), rel=1e-10
    )


def test_equal_views_have_no_loss_and_the_embedding_may_not_collapse() -> None:
    parts = partition(M, 12, 1, step=0)
    assert float(wmse(torch.stack([A, A]), parts, 0.0)) == pytest.approx(0, abs=1e-12)
    # A common offset and a common scale, which pull plain embeddings together, do nothing here.
    torch.testing.assert_close(
        wmse(torch.stack([1e-3 * A + 100, 1e-3 * B + 100]), parts, 0.0), wmse(torch.stack([A, B]), parts, 0.0)
    )
    assert squared_distance(1e-3 * A + 100, 1e-3 * B + 100) < 1e-6


def test_gradients() -> None:
    a, b, parts = A[:12].clone().requires_grad_(), B[:12].clone().requires_grad_(), partition(12, 6, 1, step=2)
    for shrinkage in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda x, y, s=shrinkage: wmse(torch.stack([x, y]), parts, s), (a, b))


def test_half_precision_is_not_computed_in_half() -> None:
    a, b, parts = A.bfloat16(), B.bfloat16(), partition(M, 12, 1, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = wmse(torch.stack([a, b]), parts, 0.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wmse(torch.stack([a.float(), b.float()]), parts, 0.0), rtol=0, atol=0)
