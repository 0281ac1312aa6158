"""Against lightly, against the papers' formulas written out slowly, and against the finite-difference gradient."""

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import Tensor

from icl_msr.losses.contrastive import info_nce, nt_xent, unit
from icl_msr.losses.regression import repulsion, squared_distance
from icl_msr.views import NonSemantic


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


A, B, BANK, ROWS = random(7, 5), random(7, 5, seed=1), random(11, 5, seed=2), random(7, 3, 5, seed=3)
NEGATIVES = NonSemantic(ROWS, alpha=2.0, repulsion=0.25)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_equals_lightly(temperature: float) -> None:
    theirs = NTXentLoss(temperature, memory_bank_size=0)(A.float(), B.float())
    torch.testing.assert_close(nt_xent(A.float(), B.float(), temperature), theirs)


@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_info_nce_equals_lightly(temperature: float) -> None:
    loss = NTXentLoss(temperature, memory_bank_size=(11, 5))
    loss.memory_bank.bank = unit(BANK.float())
    loss.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    theirs = loss(A.float(), B.float())
    torch.testing.assert_close(info_nce(A.float(), B.float(), BANK.float(), temperature), theirs)


def test_byol_equals_lightly() -> None:
    theirs = 2 + 2 * NegativeCosineSimilarity()(A, B)
    torch.testing.assert_close(squared_distance(A, B), theirs)


def slow_nt_xent(temperature: float, alpha: float) -> Tensor:
    views = [unit(A), unit(B)]
    terms = []
    for v in range(2):
        for i in range(7):
            anchor = views[v][i]
            others = [views[w][k] for w in range(2) for k in range(7) if (w, k) != (v, i)]
            denominator = sum(torch.exp(anchor @ other / temperature) for other in others)
            denominator += sum(torch.exp(alpha * (anchor @ t) / temperature) for t in unit(ROWS)[i])
            terms.append(-torch.log(torch.exp(anchor @ views[1 - v][i] / temperature) / denominator))
    return torch.stack(terms).mean()


def test_nt_xent_with_non_semantic_negatives_follows_the_formula() -> None:
    torch.testing.assert_close(nt_xent(A, B, 0.5, NEGATIVES), slow_nt_xent(0.5, 2.0))


def test_info_nce_with_non_semantic_negatives_follows_the_formula() -> None:
    terms = []
    for i in range(7):
        q, positive = unit(A)[i], torch.exp(unit(A)[i] @ unit(B)[i] / 0.2)
        denominator = positive + sum(torch.exp(q @ k / 0.2) for k in unit(BANK))
        denominator += sum(torch.exp(2.0 * (q @ t) / 0.2) for t in unit(ROWS)[i])
        terms.append(-torch.log(positive / denominator))
    torch.testing.assert_close(info_nce(A, B, BANK, 0.2, NEGATIVES), torch.stack(terms).mean())


def test_repulsion_follows_the_formula() -> None:
    expected = torch.stack(
        [
            (unit(A)[i] - unit(B)[i]).square().sum()
            - 0.25 * torch.stack([(unit(A)[i] - t).square().sum() for t in unit(ROWS)[i]]).mean()
            for i in range(7)
        ]
    ).mean()
    torch.testing.assert_close(squared_distance(A, B) - repulsion(A, NEGATIVES), expected)


def test_alpha_is_inside_the_exponent() -> None:
    """A negative at right angles adds exp(0) = 1 to the denominator whatever alpha is."""
    q, t = torch.eye(2, dtype=torch.float64)[:1], torch.eye(2, dtype=torch.float64)[1:, None]
    losses = [info_nce(q, q, -q, 0.5, NonSemantic(t, alpha=a, repulsion=0.0)) for a in (1.0, 3.0)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("negatives", [None, NEGATIVES])
def test_gradients(negatives: NonSemantic | None) -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, 0.5, negatives), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: info_nce(x, y, BANK, 0.2, negatives), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: squared_distance(x, y) - repulsion(x, negatives), (a, b))


def test_half_precision_is_computed_in_single() -> None:
    """At a low temperature bf16 logits would overflow or round the loss away."""
    a, b = A.bfloat16(), B.bfloat16()
    loss = nt_xent(a, b, 0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, nt_xent(a.float(), b.float(), 0.01))


def test_autocast_does_not_reach_inside() -> None:
    a, b, bank = A.float(), B.float(), BANK.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent(a, b, 0.07), info_nce(a, b, bank, 0.07), squared_distance(a, b)
    outside = nt_xent(a, b, 0.07), info_nce(a, b, bank, 0.07), squared_distance(a, b)
    for x, y in zip(inside, outside, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
