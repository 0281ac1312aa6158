"""The linear probe, with a grid of learning rates trained in one pass over cached features.

Every head is softmax regression that begins at zero and is trained with the settings of a named preset. The learning
rate with the best head on a held-out part of the fitting set is chosen. The probe is a head trained with it on the
whole fitting set.
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
    """Settings of the training of heads, without learning rates, epochs and batch size."""

    standardised: bool
    """True if features are standardised first."""
    optimizer: Callable[..., Optimizer]
    factor: Callable[[int, int], float]
    """Maps (epoch, epochs) to the factor of the learning rate in that epoch."""


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
    """A fitted probe, with the accuracies that chose its learning rate. c channels, K classes."""

    weight: Tensor
    """(c + 1, K) float32; the last row is the bias."""
    mean: Tensor
    """(c,) mean of the fitting set; 0 if features are not standardised."""
    scale: Tensor
    """(c,) standard deviation of the fitting set; 1 if features are not standardised. See `fit_linear_probe`."""
    learning_rate: float
    held_out_accuracies: dict[float, float]
    """Accuracy in [0, 1] on the held-out part by learning rate, in ascending order of learning rates."""

    @property
    def at_edge(self) -> bool:
        """True if the learning rate lies at an edge of the grid, so that one outside might be better."""
        rates = list(self.held_out_accuracies)
        return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])

    def __call__(self, features: Tensor) -> Tensor:
        """Return class scores (logits) float32 (N, K) of `features` (N, c)."""
        return _standardise(features, self.mean, self.scale) @ self.weight


def hold_out(length: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the positions (int64, ascending) of the images to fit on, and of the held-out `fraction`.

    There is at least one image in each part.

    Raises:
        ValueError: there are fewer than two images.
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

    If the preset says so, features are standardised by the mean and standard deviation of the fitting set. A channel's
    deviation counts as at least 1/1000 of the largest one, so that a channel that is dead in the fitting set cannot
    dominate on other images. Among equal held-out accuracies, the lowest held-out cross-entropy wins. If no held-out
    image has a class that was fitted, the middle of the grid is chosen.
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
        best = len(rates) // 2  # with one image per class, held-out classes were never fitted

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
    """Return the heads (G, c + 1, K) for G learning rates, trained together; `inputs` is (N, c + 1)."""
    heads: list[Tensor] = [nn.Parameter(inputs.new_zeros(inputs.shape[1], classes)) for _ in rates]
    groups = [{"params": [head], "lr": rate} for head, rate in zip(heads, rates, strict=True)]
    optimizer = how.optimizer(groups)
    schedule = LambdaLR(optimizer, lambda epoch: how.factor(epoch, epochs))
    for epoch in range(epochs):
        order = permutation(seed, epoch, len(inputs)).to(inputs.device)
        for batch in torch.split(order, batch_size):
            logits = (inputs[batch] @ torch.cat(heads, dim=1)).view(-1, classes)  # (n G, K)
            targets = labels[batch].repeat_interleave(len(heads))
            loss = cross_entropy(logits, targets, reduction="sum") / len(batch)  # a sum keeps heads independent
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    return torch.stack([head.detach() for head in heads])


def _standardise(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return standardised features with a column of ones for the bias: (N, c) to (N, c + 1)."""
    return pad((features - mean) / scale, (0, 1), value=1.0)
