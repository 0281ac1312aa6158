"""Against the formulas written out slowly, and against the finite-difference gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icl_msr.losses import contrastive
from icl_msr.losses.contrastive import unit
from icl_msr.losses.penalties import invariance, polarization

A, B, KEYS_A, KEYS_B = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True, params=[1, 30, 2**20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One anchor at a time, some, all."""
    monkeypatch.setattr(contrastive, "CHUNK", request.param)


def slow_polarization(first: Tensor, second: Tensor, low: float, high: float) -> Tensor:
    views = [*unit(first), *unit(second)]
    humps = []
    for i, anchor in enumerate(views):
        for j, other in enumerate(views):
            distance = (1 - anchor @ other) / 2
            if i != j:
                humps.append(-torch.minimum((distance - low) * (distance - high), torch.zeros(())))
    return torch.stack(humps).mean()


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.5), (0.0, 1.0), (0.4, 0.45)])
def test_polarization_follows_the_formula(low: float, high: float) -> None:
    torch.testing.assert_close(polarization(A, B, low, high), slow_polarization(A, B, low, high))


def test_polarization_leaves_polarized_pairs_alone() -> None:
    """Two clusters of identical rows at right angles: distances 0 and 1/2."""
    a = torch.eye(2, dtype=torch.float64).repeat(3, 1)
    assert polarization(a, a, 0.1, 0.5) == 0
    assert polarization(a, a, 0.1, 0.6) > 0


@pytest.mark.parametrize(("angle", "sign"), [(0.8, 1), (1.4, -1)])
def test_polarization_pushes_a_pair_to_its_nearer_end(angle: float, sign: int) -> None:
    """Between the thresholds .1 and .5, the middle lies at cos = .4, an angle of 1.16."""
    t = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.stack([t.cos(), t.sin()])[None]
    (slope,) = torch.autograd.grad(polarization(first, second, 0.1, 0.5), t)
    assert slope.sign() == sign


def both_distributions() -> tuple[Tensor, Tensor]:
    return unit(A) @ unit(KEYS_B).T / 0.3, unit(B) @ unit(KEYS_A).T / 0.3


def test_invariance_follows_the_formula() -> None:
    p, q = (logits.log_softmax(1) for logits in both_distributions())
    kl = [F.kl_div(x, y, reduction="batchmean", log_target=True) for x, y in ((p, q), (q, p))]
    torch.testing.assert_close(invariance(A, B, KEYS_A, KEYS_B, 0.3), (kl[0] + kl[1]) / 2)


def test_invariance_of_alike_views_is_zero() -> None:
    torch.testing.assert_close(invariance(A, A, KEYS_A, KEYS_A, 0.3), torch.zeros((), dtype=torch.float64))


def test_gradients() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: polarization(x, y, 0.1, 0.5), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: invariance(x, y, KEYS_A, KEYS_B, 0.3), (a, b))


LOSSES = {
    "polarization": lambda a, b, keys_a, keys_b: polarization(a, b, 0.1, 0.5),
    "invariance": lambda a, b, keys_a, keys_b: invariance(a, b, keys_a, keys_b, 0.07),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_half_precision_is_computed_in_single(name: str) -> None:
    half = [t.bfloat16() for t in (A, B, KEYS_A, KEYS_B)]
    torch.testing.assert_close(LOSSES[name](*half), LOSSES[name](*(t.float() for t in half)))


@pytest.mark.parametrize("name", list(LOSSES))
def test_autocast_does_not_reach_inside(name: str) -> None:
    """Neither in the forward pass nor where the backward pass computes it again."""
    leaves = [t.float().requires_grad_() for t in (A, B, KEYS_A, KEYS_B)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name](*leaves)
    outside = LOSSES[name](*leaves)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    gradients = [torch.autograd.grad(loss, leaves[:2]) for loss in (inside, outside)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
