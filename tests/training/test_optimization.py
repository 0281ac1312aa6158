"""Schedules against torch's own, and what the optimiser is given."""

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny import composed
from timm.optim import Lars
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from icl_msr.cli.assemble import make_optimization
from icl_msr.core.config import check
from icl_msr.core.errors import UserError
from icl_msr.training.optimization import Optimization, constant, cosine, drops

SCHEDULES = {"constant": constant, "cosine": cosine, "drops": drops}
TOTAL, EPOCH = 120, 2.0  # optimiser steps, 60 epochs


def optimization(
    kind: Callable[..., Optimizer] = SGD,
    schedule: str = "constant",
    bias_and_norm: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **changes: Any,
) -> Optimization:
    """Our schedules on an optimiser of torch; `changes` are keys of the schedule."""
    keys: dict[str, Any] = {"warmup_steps": 0, "warmup_epochs": 0.0, "scale_lr": "none", **changes}
    if schedule == "drops":
        keys = {"drop_at": [50, 25], "drop_factor": 0.2, **keys}
    given = {"lr": 0.4, "weight_decay": 1e-4, **(optimizer or {})}
    return Optimization(partial(kind, **given), partial(SCHEDULES[schedule], **keys), bias_and_norm)


def factor(chosen: Optimization, step: int, total: int, epoch: float) -> float:
    """The share of the learning rate that holds at a step."""
    rate = chosen.learning_rate(step, 256, total, epoch)
    assert rate is not None
    return rate / 0.4


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def after_warmup(optimizer: Optimizer, schedule: str, warmup: int) -> LRScheduler:
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, TOTAL - warmup)
    if schedule == "drops":
        return MultiStepLR(optimizer, [TOTAL - 100 - warmup, TOTAL - 50 - warmup], 0.2)
    return ConstantLR(optimizer, 1.0)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "drops"])
def test_schedules_are_torchs(schedule: str, warmup: int) -> None:
    optimizer = SGD(network().parameters(), 0.4)
    expected: LRScheduler = after_warmup(optimizer, schedule, warmup)
    if warmup:
        ramp = LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
        expected = SequentialLR(optimizer, [ramp, expected], [warmup])
    two_groups = {"weight_decay": 0.0}
    ours, ticking = optimization(schedule=schedule, warmup_steps=warmup, bias_and_norm=two_groups).build(
        network(), 256, TOTAL, EPOCH
    )
    for step in range(TOTAL):
        expected_factor = factor(optimization(schedule=schedule, warmup_steps=warmup), step, TOTAL, EPOCH)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * expected_factor), step
        assert [group["lr"] for group in ours.param_groups] == pytest.approx([0.4 * expected_factor] * 2)
        for stepped in (optimizer, ours):
            stepped.step()
        expected.step()
        ticking.step()


def test_closed_forms() -> None:
    wave = optimization(schedule="cosine", warmup_steps=20)
    assert [factor(wave, step, 120, EPOCH) for step in (0, 9, 19, 20)] == pytest.approx([0.05, 0.5, 1, 1])
    assert factor(wave, 70, 120, EPOCH) == pytest.approx(0.5)
    assert factor(wave, 119, 120, EPOCH) == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)
    stairs = optimization(schedule="drops")
    # 60 epochs of 2 steps: x 0.2 when 50 epochs are left, and when 25 are.
    assert [factor(stairs, step, 120, EPOCH) for step in (19, 20, 69, 70, 119)] == pytest.approx(
        [1, 0.2, 0.2, 0.04, 0.04]
    )


def test_a_drop_before_the_beginning_is_none() -> None:
    """A run of 12 epochs has no moment 25 epochs before its end; it begins at the learning rate that was asked for."""
    stairs = optimization(schedule="drops", drop_at=[50, 25, 3])
    assert [factor(stairs, step, 24, EPOCH) for step in (0, 17, 18, 23)] == pytest.approx([1, 1, 0.2, 0.2])


def test_warmup_in_epochs() -> None:
    warm = optimization(warmup_epochs=2.5, warmup_steps=3)
    assert [factor(warm, step, TOTAL, EPOCH) for step in (0, 4, 5)] == pytest.approx([0.2, 1, 1])
    longer = optimization(warmup_epochs=1.0, warmup_steps=10)  # the longer of the two
    assert factor(longer, 0, TOTAL, EPOCH) == pytest.approx(0.1)


def test_effective_learning_rate() -> None:
    assert optimization().effective_lr(1024) == 0.4
    assert optimization(scale_lr="linear").effective_lr(1024) == pytest.approx(1.6)
    optimizer, _ = optimization(scale_lr="linear").build(network(), 64, TOTAL, EPOCH)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "kind"), [("sgd", SGD), ("adam", Adam), ("adamw", AdamW), ("lars", Lars)])
def test_the_named_optimizer(name: str, kind: type[Optimizer]) -> None:
    momentum = ["optimizer.momentum=0.8"] if name in ("sgd", "lars") else []
    chosen = make_optimization(check(composed(f"optimizer={name}", *momentum)))
    optimizer, _ = chosen.build(network(), 256, TOTAL, EPOCH)
    assert type(optimizer) is kind
    if name in ("sgd", "lars"):
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_biases_and_norms_may_be_free_of_decay() -> None:
    net = network()
    net[2].weight.requires_grad_(False)  # type: ignore[index]
    optimizer, _ = optimization(bias_and_norm={"weight_decay": 0.0}).build(net, 256, TOTAL, EPOCH)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay.get(p) for name, p in net.named_parameters()} == {
        "0.weight": 1e-4,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": None,  # frozen
        "2.bias": 0.0,
    }
    optimizer, _ = optimization().build(net, 256, TOTAL, EPOCH)
    assert len(optimizer.param_groups[0]["params"]) == 5
    torch.testing.assert_close(optimizer.param_groups[0]["weight_decay"], 1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_follows_its_formula(decay: float, clip: bool) -> None:
    """v <- m v + lr r (g + decay w) with r = eta |w| / (|g| + decay |w|) (You et al. 2017, eq. 6); biases and norms by
    SGD. Clipped (LARC): min(lr, r) in the place of lr r."""
    torch.manual_seed(0)
    net = network()
    keys = {"weight_decay": decay, "momentum": 0.9, "trust_coeff": 0.5, "trust_clip": clip, "always_adapt": True}
    free = {"weight_decay": 0.0, "always_adapt": False}
    optimizer, _ = optimization(Lars, optimizer=keys, bias_and_norm=free).build(net, 256, 1, 1.0)
    clipped: set[bool] = set()
    weights = {p: p.detach().clone() for p in net.parameters()}
    velocity = {p: torch.zeros_like(p) for p in net.parameters()}
    for size in (1.0, 0.1, 0.3):
        for p in net.parameters():
            p.grad = size * torch.randn_like(p)
            w, g = weights[p], p.grad
            if p.ndim > 1:
                rate = 0.5 * (w.norm() / (g.norm() + decay * w.norm())).item()
                clipped.add(rate > 0.4)
                g = (min(rate / 0.4, 1) if clip else rate) * (g + decay * w)
            velocity[p] = 0.9 * velocity[p] + g
            weights[p] = w - 0.4 * velocity[p]
        optimizer.step()
    for p, expected in weights.items():
        torch.testing.assert_close(p.detach(), expected)
    assert clipped == {False, True}  # both cases occur


def test_lars_needs_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"^optimizer._target_=timm.optim.Lars cannot be imported .* install the package"
    ):
        check(composed("optimizer=lars"))
