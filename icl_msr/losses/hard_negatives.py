"""Hard negatives in the space of embeddings. A anchors, K bank, D embedding, H hardest negatives of an anchor.

Each of them changes the sum over an anchor's negatives, in any loss that has one, and knows nothing of the loss. HCL
weights the negatives; MoCHi and SynCo add synthetic ones. They are made anew for each anchor, without gradient, and
compared with their own anchor only.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys, uniforms
from icl_msr.losses import contrastive
from icl_msr.losses.contrastive import HardSum, log_sum_exp, unit

_VIEW = -5  # the `view` of the hash that draws synthetic negatives


class HardNegatives(ABC):
    """What a method does with its negatives beyond counting them. A run chooses one in the group `hard_negatives`."""

    synthetic: bool
    """True if negatives are made from others, so that nothing is known of their class and no gradient reaches them."""

    @abstractmethod
    def at(self, step: int, epoch: float) -> HardSum | None:
        """Return the sum over the negatives at an optimiser step; None: the ordinary one.

        Args:
            step: index of the optimiser step.
            epoch: finished epochs, with fractions.
        """


class HCL(HardNegatives):
    """Weights each negative by how hard it is: exp(beta z.z_k / tau), of mean 1 (Robinson et al. 2021, eq. 4).

    With `method=debiased` it is the paper's loss, which also corrects for negatives of the anchor's class.
    """

    synthetic = False

    def __init__(self, *, beta: PositiveFloat):
        self.beta = beta

    @override
    def at(self, step: int, epoch: float) -> HardSum:
        return self.sum

    def sum(
        self, anchors: Tensor, bank: Tensor, temperature: float, numbers: Tensor, left_out: Tensor | None
    ) -> Tensor:
        """Return log sum_k w_k exp(z.z_k / tau), (A,). See `HardSum`."""
        harder, weights = (log_sum_exp(anchors, bank, temperature / k, left_out) for k in (1 + self.beta, self.beta))
        return harder - weights + anchors.new_tensor(negatives_of_each(bank, left_out)).log()


@dataclass(frozen=True)
class Synthesis:
    """The sum over the negatives and over synthetic ones, at one step."""

    maker: "Synthetic"
    step: int

    def __call__(
        self, anchors: Tensor, bank: Tensor, temperature: float, numbers: Tensor, left_out: Tensor | None
    ) -> Tensor:
        """Return log sum_k exp(z.z_k / tau), (A,), over the bank and the synthetic negatives. See `HardSum`."""
        against = log_sum_exp(anchors, bank, temperature, left_out)
        made = self.maker.make(anchors.detach(), bank.detach(), numbers, self.step, left_out)
        if not made.shape[1]:
            return against
        return torch.logaddexp(against, torch.logsumexp((made @ anchors[:, :, None])[..., 0] / temperature, dim=1))


class Synthetic(HardNegatives):
    """Makes new negatives from the H hardest ones of each anchor, those with the largest cosine.

    The draws depend on the seed, the step and the anchor's number in the global batch, so that ranks are one process.

    Args:
        hardest: H. If an anchor has fewer negatives, all of them.
        warmup_epochs: epochs without synthetic negatives.
        seed: seed of the draws.
    """

    synthetic = True

    def __init__(self, hardest: int, warmup_epochs: float, seed: int):
        self.hardest, self.warmup_epochs, self.seed = hardest, warmup_epochs, seed

    @override
    def at(self, step: int, epoch: float) -> HardSum | None:
        return None if epoch < self.warmup_epochs else Synthesis(self, step)

    @torch.no_grad()
    def make(self, anchors: Tensor, bank: Tensor, numbers: Tensor, step: int, left_out: Tensor | None) -> Tensor:
        """Return synthetic negatives of unit length, (A, s, D); s is 0 for an anchor without negatives.

        Args:
            anchors, bank, numbers, left_out: see `HardSum`.
            step: index of the optimiser step.
        """
        count = min(self.hardest, negatives_of_each(bank, left_out))
        if count < 1:
            return anchors.new_empty(len(anchors), 0, anchors.shape[1])
        columns = hardest(anchors, bank, count, left_out)
        return unit(torch.cat(self.kinds(anchors, bank, columns, keys(self.seed, step, numbers, _VIEW)), dim=1))

    @abstractmethod
    def kinds(self, anchors: Tensor, bank: Tensor, columns: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """Return the synthetic negatives of each kind, (A, s, D), of any length.

        Args:
            anchors, bank: (A, D) and (K, D).
            columns: (A, H) int64, the hardest negatives' places in the bank, the hardest first.
            key: (A,) int64, the keys of the anchors' random numbers.
        """


class MoCHi(Synthetic):
    """Mixes pairs of hard negatives, and hard negatives with the anchor (Kalantidis et al. 2020, eq. 3 and 4).

    Each is the unit vector along a n_i + (1 - a) n_j, a in (0, 1), or along b z + (1 - b) n_j, b in (0, 0.5), with i
    and j drawn from the hardest.

    Args:
        hardest: N of the paper.
        pairs: s of the paper, the number of mixed pairs for each anchor.
        with_anchor: s' of the paper, the number of negatives that are mixed with the anchor.
        warmup_epochs, seed: see `Synthetic`.
    """

    def __init__(
        self,
        *,
        hardest: PositiveInt,
        pairs: NonNegativeInt,
        with_anchor: NonNegativeInt,
        warmup_epochs: NonNegativeFloat,
        seed: NonNegativeInt,
    ):
        super().__init__(hardest, warmup_epochs, seed)
        require_some(pairs=pairs, with_anchor=with_anchor)
        self.pairs, self.with_anchor = pairs, with_anchor

    @override
    def kinds(self, anchors: Tensor, bank: Tensor, columns: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        draws = Draws(bank, columns, key)
        mixed = draws.mixed(self.pairs)
        return mixed, draws.towards(anchors, self.with_anchor, 0.0, 0.5)


class SynCo(Synthetic):
    """Six kinds of synthetic negatives from a hard negative n of the anchor z (Giakoumoglou and Stathaki 2024).

    Each is the unit vector along:

    * interpolated: a z + (1 - a) n, a in (0, 0.5).
    * extrapolated: z + b (n - z), b in (1, 1.5).
    * mixed: c n + (1 - c) n', c in (0, 1), with another hard negative n'.
    * noisy: n + sigma e, with e normally distributed in each dimension.
    * perturbed: n + delta g, where g = z - (z.n) n is the gradient of the cosine at n.
    * adversarial: n + eta sign(g).

    The ranges and the kinds are those of the authors' code. There, the last two follow a finite difference along a
    random direction of length 1e-5, which leaves n where it is; the gradient itself is used here.

    Args:
        hardest: N of the paper.
        interpolated, extrapolated, mixed, noisy, perturbed, adversarial: how many of each kind, for each anchor.
        sigma, delta, eta: sizes of the last three changes.
        warmup_epochs, seed: see `Synthetic`.
    """

    def __init__(
        self,
        *,
        hardest: PositiveInt,
        interpolated: NonNegativeInt,
        extrapolated: NonNegativeInt,
        mixed: NonNegativeInt,
        noisy: NonNegativeInt,
        perturbed: NonNegativeInt,
        adversarial: NonNegativeInt,
        sigma: NonNegativeFloat,
        delta: NonNegativeFloat,
        eta: NonNegativeFloat,
        warmup_epochs: NonNegativeFloat,
        seed: NonNegativeInt,
    ):
        super().__init__(hardest, warmup_epochs, seed)
        self.counts = {"interpolated": interpolated, "extrapolated": extrapolated, "mixed": mixed, "noisy": noisy}
        self.counts |= {"perturbed": perturbed, "adversarial": adversarial}
        require_some(**self.counts)
        self.sigma, self.delta, self.eta = sigma, delta, eta

    @override
    def kinds(self, anchors: Tensor, bank: Tensor, columns: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        draws, counts = Draws(bank, columns, key), self.counts
        interpolated = draws.towards(anchors, counts["interpolated"], 0.0, 0.5)
        extrapolated = draws.towards(anchors, counts["extrapolated"], 0.0, -0.5)
        mixed = draws.mixed(counts["mixed"])
        noisy = draws.hard(counts["noisy"])
        noisy = noisy + self.sigma * draws.normal(noisy)
        perturbed, adversarial = draws.hard(counts["perturbed"]), draws.hard(counts["adversarial"])
        perturbed = perturbed + self.delta * gradient(anchors, perturbed)
        adversarial = adversarial + self.eta * gradient(anchors, adversarial).sign()
        return interpolated, extrapolated, mixed, noisy, perturbed, adversarial


class Draws:
    """Random numbers and random hard negatives of each anchor. Each draw takes numbers that no other has taken.

    Args:
        bank: (K, D).
        columns: (A, H) int64, the hardest negatives of each anchor.
        key: (A,) int64.
    """

    def __init__(self, bank: Tensor, columns: Tensor, key: Tensor):
        self.bank, self.columns, self.key = bank, columns, key
        self.taken = 0

    def uniform(self, count: int) -> Tensor:
        """Return numbers in [0, 1), (A, count)."""
        first, self.taken = self.taken, self.taken + count
        return uniforms(self.key, count, first).to(self.bank.dtype)

    def normal(self, like: Tensor) -> Tensor:
        """Return normally distributed numbers in the shape (A, s, D) of another tensor."""
        size = like.shape[1] * like.shape[2]
        radius, angle = (1 - self.uniform(size)).log().mul(-2).sqrt(), self.uniform(size).mul(2 * torch.pi)
        return (radius * angle.cos()).view_as(like)

    def hard(self, count: int) -> Tensor:
        """Return `count` of the hardest negatives of each anchor, (A, count, D)."""
        most = self.columns.shape[1]
        places = (self.uniform(count) * most).long().clamp(max=most - 1)
        return self.bank[self.columns.gather(1, places)]

    def mixed(self, count: int) -> Tensor:
        """Return points between two hard negatives, (A, count, D)."""
        one, other, share = self.hard(count), self.hard(count), self.uniform(count)[..., None]
        return share * one + (1 - share) * other

    def towards(self, anchors: Tensor, count: int, low: float, high: float) -> Tensor:
        """Return s z + (1 - s) n with s between `low` and `high`, (A, count, D). A negative s leads away from z."""
        share = (low + (high - low) * self.uniform(count))[..., None]
        return share * anchors[:, None] + (1 - share) * self.hard(count)


def gradient(anchors: Tensor, negatives: Tensor) -> Tensor:
    """Return the gradient of the cosine with the anchors (A, D) at negatives of unit length, (A, s, D)."""
    return anchors[:, None] - (negatives @ anchors[:, :, None]) * negatives


def negatives_of_each(bank: Tensor, left_out: Tensor | None) -> int:
    """Return the number of negatives of an anchor."""
    return len(bank) - (0 if left_out is None else left_out.shape[1])


@torch.no_grad()
def hardest(anchors: Tensor, bank: Tensor, count: int, left_out: Tensor | None) -> Tensor:
    """Return the places in the bank of the largest cosines with each anchor, int64 (A, count), the largest first.

    Args:
        anchors, bank: (A, D) and (K, D), of unit length.
        count: at most the number of negatives of an anchor.
        left_out: see `log_sum_exp`.
    """
    places = []
    for start in range(0, len(anchors), step := max(1, contrastive.CHUNK // max(1, len(bank)))):
        cosines = anchors[start : start + step] @ bank.T
        if left_out is not None:
            cosines.scatter_(1, left_out[start : start + step], float("-inf"))
        places.append(cosines.topk(count, dim=1).indices)
    return torch.cat(places)


def require_some(**counts: int) -> None:
    """Check that at least one synthetic negative is made.

    Raises:
        UserError: all counts are 0.
    """
    if not any(counts.values()):
        names = " and ".join(f"hard_negatives.{name}" for name in list(counts)[:2])
        raise UserError(f"no synthetic negative is asked for; set {names} to 1 or more, or type hard_negatives=none.")
