"""Against lightly, against the papers' formulas written out slowly, and against the finite-difference gradient."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DCLLoss, DCLWLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import NNMemoryBankModule
from torch import Tensor

from icl_msr.core.views import AlphaMode, AlphaSchedule, NonSemantic
from icl_msr.losses import contrastive
from icl_msr.losses.contrastive import (
    debiased,
    decoupled,
    in_batch_nce,
    info_nce,
    log_sum_exp,
    nearest,
    neighbour_nce,
    nt_xent,
    unit,
    von_mises_fisher_weights,
    with_non_semantic,
)
from icl_msr.losses.hard_negatives import HCL
from icl_msr.losses.regression import repulsion, squared_distance


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


A, B, BANK, ROWS = random(7, 5), random(7, 5, seed=1), random(11, 5, seed=2), random(7, 3, 5, seed=3)
NEGATIVES = NonSemantic(ROWS, alpha=2.0, repulsion=0.25)
HARD = HCL(beta=1.0).at(0, 0.0)


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


def slow_sums(temperature: float, alpha: float) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each of the 2N anchors: its image, exp(positive), the sum over other images, that over non-semantic ones."""
    views = [unit(A), unit(B)]
    sums = []
    for v in range(2):
        for i in range(7):
            anchor = views[v][i]
            others = [views[w][k] for w in range(2) for k in range(7) if k != i]
            sums.append(
                (
                    i,
                    torch.exp(anchor @ views[1 - v][i] / temperature),
                    torch.stack([torch.exp(anchor @ other / temperature) for other in others]).sum(),
                    torch.stack([torch.exp(alpha * (anchor @ t) / temperature) for t in unit(ROWS)[i]]).sum(),
                )
            )
    return sums


def test_nt_xent_with_non_semantic_negatives_follows_the_formula() -> None:
    terms = [-torch.log(p / (p + others + extra)) for _, p, others, extra in slow_sums(0.5, 2.0)]
    torch.testing.assert_close(nt_xent(A, B, 0.5, NEGATIVES), torch.stack(terms).mean())


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_decoupled_equals_lightly(temperature: float) -> None:
    theirs = DCLLoss(temperature)(A.float(), B.float())
    torch.testing.assert_close(decoupled(A.float(), B.float(), temperature), theirs)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_weighted_decoupled_equals_lightly(sigma: float) -> None:
    theirs = DCLWLoss(0.1, sigma)(A.float(), B.float())
    torch.testing.assert_close(decoupled(A.float(), B.float(), 0.1, sigma), theirs)


def test_decoupled_is_nt_xent_without_the_positive_in_the_denominator() -> None:
    terms = [-torch.log(p / (others + extra)) for _, p, others, extra in slow_sums(0.5, 2.0)]
    torch.testing.assert_close(decoupled(A, B, 0.5, None, NEGATIVES), torch.stack(terms).mean())


def test_weights_of_the_positives_follow_the_formula() -> None:
    cosines = (unit(A) * unit(B)).sum(1)
    weights = von_mises_fisher_weights(A, B, 0.5)
    torch.testing.assert_close(weights, 2 - (cosines / 0.5).exp() / (cosines / 0.5).exp().mean())
    terms = [
        -w * p.log() + (o + e).log() for w, (_, p, o, e) in zip(weights.repeat(2), slow_sums(0.2, 2.0), strict=True)
    ]
    torch.testing.assert_close(decoupled(A, B, 0.2, 0.5, NEGATIVES), torch.stack(terms).mean())


@pytest.mark.parametrize("tau_plus", [0.02, 0.2, 0.4])
def test_debiased_follows_the_formula(tau_plus: float) -> None:
    """With and without the bound, which the largest tau+ reaches for some anchors."""
    terms, bounded = [], 0
    for _, p, others, extra in slow_sums(0.2, 2.0):
        g = (others / 12 - tau_plus * p) / (1 - tau_plus)
        bounded += int(g < math.exp(-1 / 0.2))
        terms.append(-torch.log(p / (p + 12 * g.clamp(min=math.exp(-1 / 0.2)) + extra)))
    torch.testing.assert_close(debiased(A, B, 0.2, tau_plus, NEGATIVES), torch.stack(terms).mean())
    assert (0 < bounded < 14) == (tau_plus > 0.02)


def test_debiased_without_false_negatives_is_nt_xent() -> None:
    torch.testing.assert_close(debiased(A, B, 0.2, 0.0, NEGATIVES), nt_xent(A, B, 0.2, NEGATIVES))


def test_debiased_stays_finite_where_nothing_is_left() -> None:
    """Identical views at a low temperature: exp(1 / tau) overflows and the bound alone is left."""
    a = torch.eye(4).requires_grad_()
    loss = debiased(a, a, 0.01, 0.1)
    (gradient,) = torch.autograd.grad(loss, a)
    torch.testing.assert_close(loss, torch.tensor(math.log1p(6 * math.exp(-200))))
    assert gradient.isfinite().all()


def test_in_batch_nce_follows_the_formula() -> None:
    logits = unit(A) @ unit(B).T / 0.2
    torch.testing.assert_close(in_batch_nce(A, B, 0.2), F.cross_entropy(logits, torch.arange(7)))
    extra = 2.0 * torch.einsum("nd,nmd->nm", unit(A), unit(ROWS)) / 0.2
    expected = F.cross_entropy(torch.cat([logits, extra], 1), torch.arange(7))
    torch.testing.assert_close(in_batch_nce(A, B, 0.2, NEGATIVES), expected)


def test_neighbour_nce_follows_the_formula() -> None:
    logits = unit(A) @ unit(B).T / 0.2
    torch.testing.assert_close(neighbour_nce(A, B, 0.2), F.cross_entropy(logits, torch.arange(7)))
    extra = 2.0 * torch.einsum("nd,nmd->nm", unit(B), unit(ROWS)) / 0.2
    expected = F.cross_entropy(torch.cat([logits, extra], 1), torch.arange(7))
    torch.testing.assert_close(neighbour_nce(A, B, 0.2, NEGATIVES), expected)


@pytest.mark.parametrize("chunk", [1, 25, 2**20])
def test_nearest_equals_lightly(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    bank = NNMemoryBankModule(size=(11, 5))
    bank.bank, bank.bank_ptr = unit(BANK), torch.zeros(1, dtype=torch.long)
    found = nearest(A.clone().requires_grad_(), BANK)
    torch.testing.assert_close(found, bank(A, update=False))
    assert not found.requires_grad


@pytest.mark.parametrize("chunk", [1, 25, 60])
@pytest.mark.parametrize("excluded", [False, True])
def test_log_sum_exp_in_chunks_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, chunk: int, excluded: bool
) -> None:
    """Chunks of 1, 2 and 5 of 7 anchors, the last one shorter."""
    left_out = torch.stack([torch.arange(7), torch.tensor([10, 0, 0, 1, 9, 3, 5])], 1) if excluded else None
    weights = random(7, seed=4)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        logits = a @ b.T / 0.3
        return torch.logsumexp(logits if left_out is None else logits.scatter(1, left_out, float("-inf")), dim=1)

    def with_gradients(function: object) -> list[Tensor]:
        a, b = A.clone().requires_grad_(), BANK.clone().requires_grad_()
        value = function(a, b)  # type: ignore[operator]
        return [value, *torch.autograd.grad((weights * value).sum(), (a, b))]

    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    chunked = with_gradients(lambda a, b: log_sum_exp(a, b, 0.3, left_out))
    for found, expected in zip(chunked, with_gradients(plain), strict=True):
        torch.testing.assert_close(found, expected)
    inputs = (A.clone().requires_grad_(), BANK.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: log_sum_exp(a, b, 0.3, left_out), inputs)


def test_log_sum_exp_refuses_a_second_derivative() -> None:
    a = A.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(log_sum_exp(a, BANK, 0.3).sum(), a, create_graph=True)


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


WEIGHTED = replace(NEGATIVES, alpha_mode="weight")
WITH_NEGATIVES = {
    "nt_xent": lambda negatives: nt_xent(A, B, 0.3, negatives),
    "info_nce": lambda negatives: info_nce(A, B, BANK, 0.3, negatives),
    "in_batch_nce": lambda negatives: in_batch_nce(A, B, 0.3, negatives),
    "neighbour_nce": lambda negatives: neighbour_nce(B, A, 0.3, negatives),
    "decoupled": lambda negatives: decoupled(A, B, 0.3, None, negatives),
    "debiased": lambda negatives: debiased(A, B, 0.3, 0.1, negatives),
    "hard": lambda negatives: debiased(A, B, 0.3, 0.1, negatives, HARD),
}


@pytest.mark.parametrize("loss", WITH_NEGATIVES.values(), ids=WITH_NEGATIVES)
def test_alpha_as_a_weight(loss: Callable[[NonSemantic | None], Tensor]) -> None:
    """A weight of 3 is three copies; of 1, the same as an exponent of 1; of 0, no negatives."""
    copies = NonSemantic(ROWS.repeat(1, 3, 1), alpha=1.0, repulsion=0.25)
    torch.testing.assert_close(loss(replace(WEIGHTED, alpha=3.0)), loss(copies))
    torch.testing.assert_close(loss(replace(WEIGHTED, alpha=1.0)), loss(replace(NEGATIVES, alpha=1.0)))
    assert torch.equal(loss(replace(WEIGHTED, alpha=0.0)), loss(None))
    assert not torch.isclose(loss(WEIGHTED), loss(NEGATIVES), rtol=1e-4)


def test_alpha_as_a_weight_follows_the_formula() -> None:
    terms = []
    for i in range(7):
        q, positive = unit(A)[i], torch.exp(unit(A)[i] @ unit(B)[i] / 0.2)
        denominator = positive + sum(torch.exp(q @ k / 0.2) for k in unit(BANK))
        denominator += sum(2.0 * torch.exp(q @ t / 0.2) for t in unit(ROWS)[i])
        terms.append(-torch.log(positive / denominator))
    torch.testing.assert_close(info_nce(A, B, BANK, 0.2, WEIGHTED), torch.stack(terms).mean())


@pytest.mark.parametrize(("schedule", "quarter"), [("constant", 1), ("linear", 0.25), ("cosine", 0.5 - 0.125**0.5)])
def test_alpha_rises_with_progress(schedule: AlphaSchedule, quarter: float) -> None:
    negatives = replace(NEGATIVES, alpha_schedule=schedule, alpha_mode="weight")
    for progress, share in ((0.0, float(schedule == "constant")), (0.25, quarter), (1.0, 1)):
        now = negatives.at(progress)
        assert (now.alpha, now.repulsion) == pytest.approx((2.0 * share, 0.25 * share))
        assert now.rows is ROWS
        assert now.alpha_mode == "weight"
        assert now.at(0.5).alpha == now.alpha  # what holds at a step is never scaled again


@pytest.mark.parametrize("mode", ["exponent", "weight"])
def test_alpha_zero_repels_nothing(mode: AlphaMode) -> None:
    """So a schedule may begin at 0 in both modes."""
    a = A.clone().requires_grad_()
    for negatives in (None, replace(NEGATIVES, alpha=0.0, alpha_mode=mode)):
        (gradient,) = torch.autograd.grad(with_non_semantic(unit(a) @ unit(B)[0], unit(a), 0.2, negatives).sum(), a)
        share = 1.0 if negatives is None or mode == "weight" else (unit(A) @ unit(B)[0]).exp()
        share = share if isinstance(share, float) else (share / (share + 3))[:, None]
        plain = torch.autograd.grad((unit(a) @ unit(B)[0]).sum(), a)[0]
        torch.testing.assert_close(gradient, share * plain)


@pytest.mark.parametrize("negatives", [None, NEGATIVES, WEIGHTED])
def test_gradients(negatives: NonSemantic | None) -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, 0.5, negatives), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: info_nce(x, y, BANK, 0.2, negatives), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: in_batch_nce(x, y, 0.2, negatives), (a, b))
    assert torch.autograd.gradcheck(lambda x: neighbour_nce(B, x, 0.2, negatives), (a,))
    assert torch.autograd.gradcheck(lambda x, y: decoupled(x, y, 0.2, None, negatives), (a, b))
    for tau_plus in (0.02, 0.4):
        assert torch.autograd.gradcheck(lambda x, y, t=tau_plus: debiased(x, y, 0.2, t, negatives), (a, b))
    assert torch.autograd.gradcheck(lambda x, y: squared_distance(x, y) - repulsion(x, negatives), (a, b))


LOSSES = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.07),
    "info_nce": lambda a, b: info_nce(a, b, BANK.float(), 0.07),
    "in_batch_nce": lambda a, b: in_batch_nce(a, b, 0.07),
    "neighbour_nce": lambda a, b: neighbour_nce(a, b, 0.07),
    "nearest": lambda a, b: nearest(a, b),
    "decoupled": lambda a, b: decoupled(a, b, 0.07, 0.5),
    "debiased": lambda a, b: debiased(a, b, 0.07, 0.1),
    "hard": lambda a, b: debiased(a, b, 0.07, 0.1, None, HARD),
    "squared_distance": lambda a, b: squared_distance(a, b),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_half_precision_is_computed_in_single(name: str) -> None:
    """At a low temperature bf16 logits would overflow or round the loss away."""
    a, b = A.bfloat16(), B.bfloat16()
    loss = LOSSES[name](a, b)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](a.float(), b.float()))


@pytest.mark.parametrize("name", list(LOSSES))
def test_autocast_does_not_reach_inside(name: str) -> None:
    a, b = A.float(), B.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name](a, b)
    torch.testing.assert_close(inside, LOSSES[name](a, b), rtol=0, atol=0)
