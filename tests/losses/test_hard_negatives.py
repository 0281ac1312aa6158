"""Hard negatives against loops in float64 that share nothing with the package but the random numbers."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from support.ranks import Ranks
from support.toys import METHODS, make_method, make_views
from torch import Tensor

from icl_msr.core.config import build
from icl_msr.core.distributed import rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys, uniforms
from icl_msr.core.views import NonSemantic
from icl_msr.losses import contrastive
from icl_msr.losses.contrastive import debiased, decoupled, in_batch_nce, info_nce, neighbour_nce, nt_xent
from icl_msr.losses.hard_negatives import HCL, HardNegatives, MoCHi, SynCo
from icl_msr.methods import Step

N, D, TAU = 8, 5, 0.4
HARDEST, SEED, STEP = 6, 3, 17


def rows(count: int, seed: int) -> Tensor:
    made = torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made / made.norm(dim=1, keepdim=True)


A, B, BANK = rows(N, 0), rows(N, 1), rows(20, 2)
NEGATIVES = NonSemantic(rows(2 * N, 3).view(N, 2, D), alpha=2.0, repulsion=0.0)

MAKERS: dict[str, HardNegatives] = {
    "hcl": HCL(beta=1.5),
    "mochi": MoCHi(hardest=HARDEST, pairs=4, with_anchor=3, warmup_epochs=0.0, seed=SEED),
    "synco": SynCo(
        hardest=HARDEST,
        interpolated=3,
        extrapolated=2,
        mixed=3,
        noisy=2,
        perturbed=2,
        adversarial=2,
        sigma=0.3,
        delta=0.4,
        eta=0.2,
        warmup_epochs=0.0,
        seed=SEED,
    ),
}


def lengthened(vector: Tensor) -> Tensor:
    return vector / (vector * vector).sum().sqrt()


class Slots:
    """The random numbers of one anchor, in order."""

    def __init__(self, number: int):
        self.numbers = uniforms(keys(SEED, STEP, torch.tensor([number]), -5), 4000)[0].double().tolist()

    def take(self, count: int) -> list[float]:
        taken, self.numbers = self.numbers[:count], self.numbers[count:]
        return taken


def synthetic(name: str, z: Tensor, others: list[Tensor], number: int) -> list[Tensor]:
    """The synthetic negatives of one anchor, from the papers' formulas."""
    if name == "hcl":
        return []
    z, slots = z.detach(), Slots(number)
    hard = sorted((n.detach() for n in others), key=lambda n: -float(n @ z))[:HARDEST]
    pick = lambda count: [hard[int(u * len(hard))] for u in slots.take(count)]  # noqa: E731
    made: list[Tensor] = []

    def mixed(count: int) -> None:
        one, other = pick(count), pick(count)
        made.extend(a * n + (1 - a) * m for n, m, a in zip(one, other, slots.take(count), strict=True))

    def towards(count: int, until: float) -> None:
        shares = slots.take(count)
        made.extend(until * u * z + (1 - until * u) * n for u, n in zip(shares, pick(count), strict=True))

    if name == "mochi":
        mixed(4)
        towards(3, 0.5)
    else:
        towards(3, 0.5)
        shares = slots.take(2)
        made.extend(z + (1 + 0.5 * u) * (n - z) for u, n in zip(shares, pick(2), strict=True))
        mixed(3)
        noisy = pick(2)
        radii, angles = slots.take(2 * D), slots.take(2 * D)
        e = [
            math.sqrt(-2 * math.log(1 - r)) * math.cos(2 * math.pi * angle)
            for r, angle in zip(radii, angles, strict=True)
        ]
        made.extend(n + 0.3 * torch.tensor(e[D * k : D * (k + 1)]).double() for k, n in enumerate(noisy))
        perturbed, adversarial = pick(2), pick(2)
        made.extend(n + 0.4 * (z - (z @ n) * n) for n in perturbed)
        made.extend(n + 0.2 * torch.sign(z - (z @ n) * n) for n in adversarial)
    return [lengthened(h) for h in made]


def total(name: str, z: Tensor, others: list[Tensor], number: int) -> Tensor:
    """The sum over one anchor's negatives."""
    e = [torch.exp(z @ n / TAU) for n in others]
    if name == "hcl":
        weights = [x**1.5 for x in e]
        mean = torch.stack(weights).sum() / len(weights)
        e = [w / mean * x for w, x in zip(weights, e, strict=True)]
    e += [torch.exp(z @ h / TAU) for h in synthetic(name, z, others, number)]
    return torch.stack(e).sum()


def own(z: Tensor, image: int) -> Tensor:
    """The sum over an anchor's non-semantic negatives."""
    return torch.stack([torch.exp(2.0 * (z @ t) / TAU) for t in NEGATIVES.rows[image]]).sum()


def in_batch(name: str, a: Tensor, b: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Of each anchor of two views: its image, exp(positive), and the sum over the views of other images."""
    views, found = [list(a), list(b)], []
    for v in (0, 1):
        for i in range(N):
            others = [views[w][k] for w in (0, 1) for k in range(N) if k != i]
            positive = torch.exp(views[v][i] @ views[1 - v][i] / TAU)
            found.append((i, positive, total(name, views[v][i], others, v * N + i)))
    return found


def nt_xent_by_hand(name: str, a: Tensor, b: Tensor) -> Tensor:
    terms = [-torch.log(p / (p + s + own([*a, *b][k], i))) for k, (i, p, s) in enumerate(in_batch(name, a, b))]
    return torch.stack(terms).mean()


def info_nce_by_hand(name: str, a: Tensor, b: Tensor) -> Tensor:
    terms = []
    for i in range(N):
        positive = torch.exp(a[i] @ b[i] / TAU)
        terms.append(-torch.log(positive / (positive + total(name, a[i], list(BANK), i) + own(a[i], i))))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("in_a_queue", [True, False])
def test_losses_by_hand(name: str, in_a_queue: bool) -> None:
    hard = MAKERS[name].at(STEP, 0.0)
    for_us, for_them = ([t.clone().requires_grad_() for t in (A, B)] for _ in range(2))
    if in_a_queue:
        ours = info_nce(*for_us, BANK, TAU, NEGATIVES, hard)
        theirs = info_nce_by_hand(name, *for_them)
    else:
        ours, theirs = nt_xent(*for_us, TAU, NEGATIVES, hard), nt_xent_by_hand(name, *for_them)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    gradients, expected = torch.autograd.grad(ours, for_us), torch.autograd.grad(theirs, for_them)
    for found, wanted, at in zip(gradients, expected, for_us, strict=True):
        tangent = wanted - (wanted * at).sum(1, keepdim=True) * at  # ours normalises the embeddings once more
        torch.testing.assert_close(found, tangent.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.2])
def test_hcl_is_debiased_with_weights(tau_plus: float) -> None:
    """Robinson et al. 2021, eq. 4: the weighted mean less tau+ times the positive, over 1 - tau+."""
    terms = []
    for k, (i, positive, weighted) in enumerate(in_batch("hcl", A, B)):
        g = ((weighted / 14 - tau_plus * positive) / (1 - tau_plus)).clamp(min=math.exp(-1 / TAU))
        terms.append(-torch.log(positive / (positive + 14 * g + own([*A, *B][k], i))))
    found = debiased(A, B, TAU, tau_plus, NEGATIVES, MAKERS["hcl"].at(STEP, 0.0))
    torch.testing.assert_close(found, torch.stack(terms).mean())


@pytest.mark.parametrize("name", list(MAKERS))
def test_other_losses_use_the_same_sum(name: str) -> None:
    hard = MAKERS[name].at(STEP, 0.0)
    sums = in_batch(name, A, B)
    expected = torch.stack([torch.log(s) - torch.log(p) for _, p, s in sums]).mean()
    torch.testing.assert_close(decoupled(A, B, TAU, None, None, hard), expected, rtol=1e-7, atol=0)
    terms = []
    for i in range(N):
        p, s = torch.exp(A[i] @ B[i] / TAU), total(name, A[i], [b for k, b in enumerate(B) if k != i], i)
        terms.append(torch.log1p(s / p))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(in_batch_nce(A, B, TAU, None, hard), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(neighbour_nce(A, B, TAU, None, hard), expected, rtol=1e-7, atol=0)


def on_this_rank(name: str, in_a_queue: bool) -> tuple[Tensor, Tensor]:
    a, b = (t.chunk(world_size())[rank()].clone().requires_grad_() for t in (A, B))
    hard = MAKERS[name].at(STEP, 0.0)
    loss = info_nce(a, b, BANK, TAU, None, hard) if in_a_queue else nt_xent(a, b, TAU, None, hard)
    return loss.detach(), torch.stack(torch.autograd.grad(loss, (a, b)), dim=1)


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("in_a_queue", [True, False])
def test_ranks_are_one_process(name: str, in_a_queue: bool, ranks: Ranks) -> None:
    here = partial(on_this_rank, name, in_a_queue)
    loss, gradient = here()
    losses, gradients = zip(*ranks(here), strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(torch.cat(gradients) / ranks.size, gradient)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = MAKERS["mochi"].at(STEP, 0.0)
    whole = nt_xent(A, B, TAU, None, hard)
    monkeypatch.setattr(contrastive, "CHUNK", 3 * 2 * N)
    torch.testing.assert_close(nt_xent(A, B, TAU, None, hard), whole)


def test_every_step_draws_anew_and_the_warm_up_draws_nothing() -> None:
    late = MoCHi(hardest=4, pairs=2, with_anchor=0, warmup_epochs=1.5, seed=0)
    assert late.at(9, 1.4) is None
    losses = [float(nt_xent(A, B, TAU, None, late.at(step, 1.5))) for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] > float(nt_xent(A, B, TAU))


def test_few_negatives_are_enough() -> None:
    """With two images an anchor has two negatives; with one it has none, and nothing can be made of them."""
    for name, maker in MAKERS.items():
        assert nt_xent(A[:2], B[:2], TAU, None, maker.at(STEP, 0.0)).isfinite()
        if name != "hcl":
            assert nt_xent(A[:1], B[:1], TAU, None, maker.at(STEP, 0.0)) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_method_uses_hard_negatives_or_refuses_them(name: str) -> None:
    method, views = make_method(name), make_views(n=8)
    losses: dict[str, Any] = {}
    for hard in (None, *MAKERS):
        method.hard_negatives = None if hard is None else MAKERS[hard]
        losses[str(hard)] = float(method(views, method.targets(views), Step(0, 10)).loss.detach())
    plain = losses.pop("None")
    changed = {hard for hard, loss in losses.items() if loss != plain}
    if "hard_negatives" in method.refuses:
        assert not changed
    else:
        assert changed == set(MAKERS)


def test_none_at_all_are_refused() -> None:
    with pytest.raises(UserError, match=r"hard_negatives.pairs and hard_negatives.with_anchor to 1 or more"):
        build(
            {
                "_target_": "icl_msr.losses.hard_negatives.MoCHi",
                "hardest": 4,
                "pairs": 0,
                "with_anchor": 0,
                "warmup_epochs": 0.0,
                "seed": 0,
            }
        )
