"""The linear probe: a grid of heads over learning rates, trained in one pass over cached features.

Every head is softmax regression from zero, trained as a named preset says. The head whose learning rate does best on a
held-out part of the fitting set names the learning rate; a head trained with it on the whole fitting set is the probe.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from icl_msr.core.randomness import permutation

ProbeName = Literal["ours", "wmse", "moco"]


@dataclass(frozen=True)
class ProbePreset:
    """How heads are trained; the learning rates, the epochs and the batch size are no part of it."""

    standardised: bool
    """Features are standardised first; else they are taken as they are."""
    optimizer: Callable[..., Optimizer]
    factor: Callable[[int, int], float]
    """(epoch, epochs) to the share of the learning rate that holds in that epoch."""


PROBES: Mapping[ProbeName, ProbePreset] = MappingProxyType(
    {
        "ours": ProbePreset(
            True, partial(Adam, fused=True), lambda epoch, epochs: (1 + math.cos(math.pi * epoch / epochs)) / 2
        ),
        # The code of W-MSE (Ermolov et al. 2021): 1e-2 falls to 1e-6, as for all results of ICL-MSR, section 6.2.
        "wmse": ProbePreset(
            False, partial(Adam, weight_decay=5e-6, fused=True), lambda epoch, epochs: 1e-4 ** (epoch / epochs)
        ),
        # MoCo (He et al. 2020), as in Ge et al. 2021, section 4.
        "moco": ProbePreset(
            False, partial(SGD, momentum=0.9), lambda epoch, _: 0.1 ** sum(epoch >= drop for drop in (30, 40, 50))
        ),
    }
)

_HELD_OUT = -2
"""The `epoch` of the hash that holds images out; training epochs count from 0."""


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe and how its learning rate was chosen. c channels, K classes."""

    weight: Tensor
    """(c + 1, K) float32; the last row is the bias."""
    mean: Tensor
    """(c,) of the fitting set; 0 where features are taken as they are."""
    scale: Tensor
    """(c,) standard deviation in the fitting set, or 1; see `fit_linear_probe`."""
    learning_rate: float
    held_out_accuracies: dict[float, float]
    """Accuracy in [0, 1] on the held-out part, for each learning rate of the grid, ascending."""

    @property
    def at_edge(self) -> bool:
        """Whether a learning rate outside the grid might do better."""
        rates = list(self.held_out_accuracies)
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])

    def __call__(self, features: Tensor) -> Tensor:
        """Class scores (logits) float32 (N, K) of `features` (N, c)."""
        return _standardise(features, self.mean, self.scale) @ self.weight


def hold_out(length: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions (int64, ascending) of the images to fit on and of the held-out ones: `fraction`, at least one of each.

    Raises:
        ValueError: fewer than two images.
    """
    if length < 2:
        raise ValueError("holding out needs at least two images")
    held = min(max(1, round(fraction * length)), length - 1)
    order = permutation(seed, _HELD_OUT, length)
    return order[held:].sort().values, order[:held].sort().values


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    learning_rates: Sequence[float],
    epochs: int,
    batch_size: int,
    held_out: float,
    seed: int,
    preset: ProbeName = "ours",
) -> LinearProbe:
    """Fit a probe to `features` float (N, c) and `labels` int64 (N,); `held_out` is a fraction in (0, 1).

    Where the preset says so, features are standardised by the mean and standard deviation of the fitting set; a
    channel's deviation counts as at least 1/1000 of the largest one, so that a channel that is dead there cannot decide
    elsewhere. Among equal held-out accuracies the lowest held-out cross-entropy wins; where no held-out image is of a
    class that was fitted, the middle of the grid.
    """
    how = PROBES[preset]
    mean, scale = torch.zeros_like(features[0]), torch.ones_like(features[0])
    if how.standardised:
        mean, scale = features.mean(0), features.std(0)
        scale = scale.clamp_min(max(1e-3 * scale.max().item(), torch.finfo(scale.dtype).tiny))
    inputs = _standardise(features, mean, scale)
    rates = sorted(set(learning_rates))

    fit, held = (part.to(features.device) for part in hold_out(len(features), held_out, seed))
    heads = _train(inputs[fit], labels[fit], classes, rates, epochs, batch_size, seed, how)
    logits = inputs[held] @ heads
    accuracies = (logits.argmax(2) == labels[held]).float().mean(1).tolist()
    losses = [cross_entropy(head, labels[held]).item() for head in logits]
    best = max(range(len(rates)), key=lambda head: (accuracies[head], -losses[head]))
    if not torch.isin(labels[held], labels[fit]).any():
        best = len(rates) // 2  # one image a class: held-out classes were never seen, and say nothing

    weight = _train(inputs, labels, classes, [rates[best]], epochs, batch_size, seed, how)[0]
    return LinearProbe(weight, mean, scale, rates[best], dict(zip(rates, accuracies, strict=True)))


@torch.inference_mode(False)
@torch.enable_grad()
def _train(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    how: ProbePreset,
) -> Tensor:
    """One head for each of G learning rates, (G, c + 1, K), all in one product; inputs (N, c + 1)."""
    heads: list[Tensor] = [nn.Parameter(inputs.new_zeros(inputs.shape[1], classes)) for _ in rates]
    groups = [{"params": [head], "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = how.optimizer(groups)
    schedule = LambdaLR(optimizer, lambda epoch: how.factor(epoch, epochs))
    for epoch in range(epochs):
        order = permutation(seed, epoch, len(inputs)).to(inputs.device)
        for batch in torch.split(order, batch_size):
            logits = (inputs[batch] @ torch.cat(heads, dim=1)).view(-1, classes)  # (n G, K)
            targets = labels[batch].repeat_interleave(len(heads))
            loss = cross_entropy(logits, targets, reduction="sum") / len(batch)  # heads do not share their gradients
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return torch.stack([head.detach() for head in heads])


def _standardise(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(N, c) to (N, c + 1): standardised, and a one for the bias."""
    return pad((features - mean) / scale, (0, 1), value=1.0)
