"""Against exact kernels in slow double loops, within the error of the random features; and what holds for any draw."""

import math

import pytest
import torch
from scipy.special import kv
from torch import Tensor

from icl_msr.losses.contrastive import unit
from icl_msr.losses.dependence import fourier_features, hsic_zy, imq_frequencies, root_hsic_zz, ssl_hsic

V, M, D = 3, 5, 4
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(M, D, generator=GENERATOR, dtype=torch.float64)
VIEWS = unit(IMAGES + 0.5 * torch.randn(V, M, D, generator=GENERATOR, dtype=torch.float64))
ROWS = VIEWS.flatten(0, 1)
LABELS = torch.arange(M).repeat(V)


def kernel(x: Tensor, y: Tensor, c: float) -> float:
    return c / math.sqrt(c**2 + float((x - y).square().sum()))


def exact_hsic_zy(c: float) -> float:
    """Mean over pairs of different views of an image, minus mean over all pairs."""
    same = [kernel(VIEWS[p, i], VIEWS[q, i], c) for i in range(M) for p in range(V) for q in range(V) if p != q]
    every = [kernel(x, y, c) for x in ROWS for y in ROWS]
    return sum(same) / len(same) - sum(every) / len(every)


def centring() -> Tensor:
    return torch.eye(V * M, dtype=torch.float64) - 1 / (V * M)


def exact_hsic_zz(c: float) -> float:
    """tr(K H K H) / n^2."""
    k = torch.tensor([[kernel(x, y, c) for y in ROWS] for x in ROWS], dtype=torch.float64)
    return float((k @ centring() @ k @ centring()).trace()) / (V * M) ** 2


def draws(c: float, number: int = 400, count: int = 80) -> list[tuple[Tensor, Tensor]]:
    """Fourier features of all views from two independent halves of many draws."""
    halves = (imq_frequencies(count, D, c, draw).chunk(2) for draw in range(number))
    return [(fourier_features(VIEWS, first), fourier_features(VIEWS, second)) for first, second in halves]


def assert_mean(estimates: list[Tensor], expected: float, width: float) -> None:
    """Within four standard errors, which must be small."""
    values = torch.stack(estimates)
    error = float(values.std()) / len(values) ** 0.5
    assert error < width * abs(expected)
    assert abs(float(values.mean()) - expected) < 4 * error


@pytest.mark.parametrize("c", [0.3, 1.0, 3.0])
def test_features_of_the_inverse_multiquadric(c: float) -> None:
    frequencies = imq_frequencies(200_000, D, c, draw=0)
    for x, y in ((ROWS[0], ROWS[1]), (ROWS[2], ROWS[2 + M]), (3 * ROWS[4], ROWS[5])):
        waves = torch.cos(frequencies @ (x - y))
        assert abs(float(waves.mean()) - kernel(x, y, c)) < 4 * float(waves.std()) / len(waves) ** 0.5


def test_lengths_of_the_frequencies_have_the_official_density() -> None:
    """The official code draws |w| from a table of r^((D-1)/2) K_((D-1)/2)(r)."""
    grid = torch.linspace(0, 40, 40_001, dtype=torch.float64)[1:]
    density = grid ** ((D - 1) / 2) * torch.from_numpy(kv((D - 1) / 2, grid.numpy()))
    expected = density.cumsum(0) / density.sum()
    lengths = imq_frequencies(200_000, D, 1.0, draw=1).norm(dim=1).sort().values
    found = torch.searchsorted(lengths, grid) / len(lengths)
    assert (found - expected).abs().max() < 2 / len(lengths) ** 0.5  # Kolmogorov-Smirnov: 1.95 at 0.1 %


def test_frequencies_are_a_function_of_the_draw() -> None:
    assert torch.equal(imq_frequencies(6, D, 1.0, 3), imq_frequencies(6, D, 1.0, 3))
    assert not torch.equal(imq_frequencies(6, D, 1.0, 3), imq_frequencies(6, D, 1.0, 4))
    torch.testing.assert_close(imq_frequencies(6, D, 2.0, 3), imq_frequencies(6, D, 1.0, 3) / 2)
    assert imq_frequencies(100_000, 8, 1.0, 5).isfinite().all()


@pytest.mark.parametrize("c", [0.5, 1.0])
def test_estimates_are_unbiased(c: float) -> None:
    both = draws(c)
    assert_mean([hsic_zy(features) for features, _ in both], exact_hsic_zy(c), 0.02)
    assert_mean([root_hsic_zz(features, others).square() for features, others in both], exact_hsic_zz(c), 0.02)


def test_many_features_are_the_exact_kernel() -> None:
    features = fourier_features(VIEWS, imq_frequencies(200_000, D, 1.0, draw=2))
    assert float(hsic_zy(features)) == pytest.approx(exact_hsic_zy(1.0), rel=0.01)


def test_for_any_features_the_estimates_are_traces() -> None:
    """With K the features' own kernel and L = 1 for rows of one image, tr(K H L H) / n^2 is HSIC as Gretton has it."""
    features, others = draws(1.0, number=1)[0]
    k, k_other = (f.flatten(0, 1) @ f.flatten(0, 1).T for f in (features, others))
    torch.testing.assert_close(k.diagonal(), torch.ones(V * M, dtype=torch.float64))
    same = (LABELS[:, None] == LABELS).double()
    biased = (k @ centring() @ same @ centring()).trace() / (V * M) ** 2  # of k(z, z) = 1 among the V^2 pairs of views
    unbiased = (V * (M * biased + k.mean()) - 1) / (V - 1) - k.mean()
    torch.testing.assert_close(hsic_zy(features), unbiased)
    zz = (k @ centring() @ k_other @ centring()).trace() / (V * M) ** 2
    torch.testing.assert_close(root_hsic_zz(features, others), zz.sqrt())


def test_dependence_of_views_that_agree_and_of_views_that_ignore_their_image() -> None:
    features = fourier_features(VIEWS, imq_frequencies(40, D, 1.0, 0))
    of_images, of_views = features[0] @ features[0].T, features[:, 0] @ features[:, 0].T
    agreeing = hsic_zy(features[:1].expand(V, -1, -1))
    torch.testing.assert_close(agreeing, 1 - of_images.mean())
    ignoring = hsic_zy(features[:, :1].expand(-1, M, -1))
    torch.testing.assert_close(ignoring, (of_views.sum() - V) / (V * (V - 1)) - of_views.mean())
    assert ignoring < 0 < agreeing


def test_a_collapsed_embedding_has_no_dependence_and_a_finite_gradient() -> None:
    views = torch.ones(V, M, D, dtype=torch.float64, requires_grad=True)
    loss = ssl_hsic(views, imq_frequencies(20, D, 1.0, 0).chunk(2), 3.0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, views)[0].isfinite().all()


def test_the_loss_is_the_sum_of_its_parts_on_unit_rows() -> None:
    frequencies = imq_frequencies(20, D, 1.0, 0).chunk(2)
    features, others = (fourier_features(VIEWS, f) for f in frequencies)
    expected = 3 * root_hsic_zz(features, others) - hsic_zy(features)
    torch.testing.assert_close(ssl_hsic(5 * VIEWS, frequencies, 3.0), expected)


def test_gradients() -> None:
    views = VIEWS.clone().requires_grad_()
    frequencies = imq_frequencies(20, D, 1.0, 0).chunk(2)
    assert torch.autograd.gradcheck(lambda v: ssl_hsic(v, frequencies, 3.0), views)


def test_half_precision_is_computed_in_single() -> None:
    views, frequencies = VIEWS.bfloat16(), imq_frequencies(20, D, 1.0, 0).chunk(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ssl_hsic(views, frequencies, 3.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ssl_hsic(views.float(), frequencies, 3.0), rtol=0, atol=0)
