"""The training loop: what moves, when, and that nothing else does."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import AfterBatch, trained
from torch import Tensor, nn

from icl_msr.losses.contrastive import unit
from icl_msr.methods import MoCo
from icl_msr.pretraining import Pretraining
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.regularizers.msr import meta_pass, norm

State = dict[str, Tensor]
LEARNED = ("meta", "uniform_only", "joint")


def state(module: nn.Module | None) -> State:
    """Parameters and buffers, copied."""
    values = {} if module is None else {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach().clone() for name, value in values.items()}


def equal(first: State, second: State) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def regularizer_of(module: Pretraining) -> MetaSemanticRegularizer:
    assert module.regularizer is not None
    return module.regularizer


class Meta(pl.Callback):
    """Every meta step, with what it was handed and what surrounded it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        regularizer, plain = regularizer_of(pl_module), regularizer_of(pl_module).meta_step

        def meta_step(*args: Any) -> dict[str, float]:
            method, views, targets, step, inner, _ = args
            call = {
                "index": views.index,
                "step": step.index,
                "inner": inner and {n: g.clone() for n, g in inner.items()},
            }
            if inner is not None:
                with meta_pass(method, torch.device("cpu")):
                    call["expected"] = regularizer.inner_gradient(method, views, targets, step)
            before = state(method)
            log = plain(*args)
            self.calls.append(call | {"method stays": equal(state(method), before)})
            return log

        regularizer.meta_step = meta_step  # type: ignore[method-assign]


@pytest.fixture
def start() -> Iterator[AfterBatch]:
    """The state before the first batch."""

    class Start(AfterBatch):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.seen.append(self.look(pl_module))

        def on_train_batch_end(self, *_: Any) -> None:
            pass

    yield Start(lambda module: (state(module.method), state(module.regularizer)))


@pytest.mark.parametrize("negatives", ["none", "patch"])
@pytest.mark.parametrize("regularizer", ["none", "msr"])
@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_every_combination_takes_a_step(method: str, regularizer: str, negatives: str, start: AfterBatch) -> None:
    words = (f"method={method}", f"regularizer={regularizer}", f"negatives={negatives}")
    module, trainer = trained(*words, callbacks=[start], limit_train_batches=1)
    theta, phi = start.seen[0]
    assert trainer.global_step == 1
    moved = state(module.method)
    assert all(value.isfinite().all() for value in moved.values())
    # A bias before a BatchNorm alone may stay.
    still = [name for name, _ in module.method.named_parameters() if torch.equal(moved[name], theta[name])]
    assert not still
    assert float(trainer.callback_metrics["loss"]) > 0
    if regularizer == "msr":
        assert not equal(state(module.regularizer), phi)
        assert float(trainer.callback_metrics["msr/meta_grad_norm"]) > 0
        total = trainer.callback_metrics["loss/contrastive"] + trainer.callback_metrics["loss/msr"]
        torch.testing.assert_close(trainer.callback_metrics["loss"], total)


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_negatives_change_the_loss(method: str) -> None:
    def loss(negatives: str) -> float:
        _, trainer = trained(f"method={method}", "regularizer=none", f"negatives={negatives}", limit_train_batches=1)
        return float(trainer.callback_metrics["loss"])

    assert loss("none") != loss("patch")


@pytest.mark.parametrize("schedule", ["every", "per_epoch"])
@pytest.mark.parametrize("weights", [*LEARNED, "random_net", "random", "ones"])
def test_strata_move_where_they_are_learned(weights: str, schedule: str, start: AfterBatch) -> None:
    words = ("method=simclr", f"regularizer.weights={weights}", f"regularizer.schedule={schedule}")
    module, trainer = trained(*words, callbacks=[start])
    assert equal(state(module.regularizer), start.seen[0][1]) == (weights not in LEARNED)
    assert trainer.global_step == 2
    assert (regularizer_of(module).network is None) == (weights in ("random", "ones"))


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_momentum_encoders_follow_each_optimizer_step(method: str, start: AfterBatch) -> None:
    look = AfterBatch(lambda module: state(module.method))
    words = (f"method={method}", "method.momentum=0.9", "regularizer=none", "trainer.accumulate_grad_batches=2")
    trained(*words, callbacks=[start, look], limit_train_batches=4)
    followers = [name for name in look.seen[0] if name.startswith("momentum_encoder") and name.endswith("weight")]
    moments = [start.seen[0][0], *look.seen]
    for batch, (before, after) in enumerate(itertools.pairwise(moments)):
        steps = batch % 2 == 1
        # The optimiser has made this many of its 2 steps when the momentum encoder follows; BYOL's momentum rises.
        progress = (batch + 1) / 4
        momentum = 0.9 if method == "moco" else 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
        for name in followers:
            source = after[name.removeprefix("momentum_encoder.")]
            expected = momentum * before[name] + (1 - momentum) * source if steps else before[name]
            torch.testing.assert_close(after[name], expected)


def test_the_queue_takes_in_every_micro_batch() -> None:
    def look(module: Pretraining) -> tuple[int, int, Tensor]:
        assert isinstance(module.method, MoCo)
        assert module.batch is not None
        queue = module.method.queue
        return module.global_step, int(queue.position), queue.keys[:24].clone()

    seen = AfterBatch(look)  # a callback's hook comes before the module's, which pushes
    words = ("method=moco", "regularizer=none", "trainer.accumulate_grad_batches=2")
    module, _ = trained(*words, callbacks=[seen], limit_train_batches=4)
    assert [(step, position) for step, position, _ in seen.seen] == [(0, 0), (1, 8), (1, 16), (2, 24)]
    assert isinstance(module.method, MoCo)
    assert module.batch is not None
    assert int(module.method.queue.position) == 32
    torch.testing.assert_close(module.method.queue.keys[24:32], unit(module.batch.targets.embeddings[0]))


def test_strata_move_at_their_due_steps_only() -> None:
    """With accumulation too: an optimiser step is what counts."""
    meta, look = Meta(), AfterBatch(lambda module: state(module.regularizer))
    words = ("regularizer.every=2", "trainer.accumulate_grad_batches=2")
    _, trainer = trained(*words, callbacks=[meta, look], limit_train_batches=8)
    assert trainer.global_step == 4
    assert [call["step"] for call in meta.calls] == [0, 2]
    moved = [not equal(before, after) for before, after in itertools.pairwise(look.seen)]
    assert moved == [True, False, False, False, True, False, False]  # the second and the sixth batch end with a step


@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_the_meta_step_is_handed_the_ordinary_gradient(method: str) -> None:
    """Complete, unclipped, and left as it is; the step leaves the method alone."""
    meta = Meta()
    words = (f"method={method}", "regularizer.every=1", "trainer.gradient_clip_val=1e-4", "negatives=patch")
    trained(*words, callbacks=[meta], limit_train_batches=3)
    assert len(meta.calls) == 3
    for call in meta.calls:
        assert call["method stays"]
        difference = [call["inner"][name] - g for name, g in call["expected"].items()]
        assert norm(difference) < 1e-4 * norm(call["inner"].values())
        assert norm(call["inner"].values()) > 1e-2


def test_accumulated_gradients_reach_the_meta_step_complete() -> None:
    meta = Meta()
    words = ("method=simclr", "regularizer.every=1", "trainer.accumulate_grad_batches=2")
    module, trainer = trained(*words, callbacks=[meta], limit_train_batches=2)
    (call,) = meta.calls
    last = {name: g / 2 for name, g in call["expected"].items()}  # of the second micro-batch alone
    share = norm([call["inner"][name] - g for name, g in last.items()]) / norm(last.values())
    assert 0.2 < share < 5  # the first one's part is there too


def test_the_per_epoch_schedule_moves_the_strata_alone(start: AfterBatch) -> None:
    meta = Meta()
    indices = AfterBatch(lambda module: module.batch and module.batch.views.index)
    counts = AfterBatch(lambda module: module.global_step)
    before = AfterBatch(lambda module: (state(module.method), state(module.regularizer)))
    module, trainer = trained(
        "method=moco",
        "regularizer.schedule=per_epoch",
        "trainer.accumulate_grad_batches=2",
        callbacks=[meta, indices, counts, before, start],
        limit_train_batches=4,
        max_epochs=2,
    )
    assert trainer.global_step == 4
    assert counts.seen == [0, 1, 1, 2, 2, 3, 3, 4]
    # One step of phi for each batch of the epoch, in its order, after the epoch.
    assert [call["index"].tolist() for call in meta.calls] == [index.tolist() for index in indices.seen]
    assert all(call["method stays"] and call["inner"] is None for call in meta.calls)
    for batches, first in ((before.seen[:4], start.seen[0][1]), (before.seen[4:], before.seen[4][1])):
        assert all(equal(phi, first) for _, phi in batches)
    assert not equal(before.seen[4][1], before.seen[3][1])
    theta = {name: value for name, value in state(module.method).items() if not name.startswith("queue")}
    assert equal(theta, {name: before.seen[-1][0][name] for name in theta})
    assert int(state(module.method)["queue.position"]) == 64


def test_the_learning_rate_follows_the_optimizer_steps() -> None:
    look = AfterBatch(lambda module: module.learning_rate())
    words = ("optimizer.lr=1.0", "optimizer.scale_lr=linear", "optimizer.name=sgd", "optimizer.warmup_steps=2")
    more = ("method=simclr", "regularizer=none", "trainer.accumulate_grad_batches=2")
    trained(*words, *more, callbacks=[look], limit_train_batches=4, max_epochs=2)
    effective = 16 / 256
    # What the next step will use, seen before the scheduler has ticked in the batch that makes the step.
    assert look.seen == pytest.approx([effective * f for f in (0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5)])


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    words = ("method=moco", "negatives=patch", "regularizer.every=1")
    first, again, other = (state(trained(*words, f"seed={seed}")[0]) for seed in (3, 3, 4))
    assert equal(first, again)
    assert not equal(first, other)


def test_the_random_state_outside_does_not_matter() -> None:
    """Every random number of the loop comes from the seed: a callback that draws some changes nothing."""
    words = ("method=byol", "regularizer.every=1", "negatives=patch")
    noise = AfterBatch(lambda module: torch.rand(3))
    assert equal(state(trained(*words)[0]), state(trained(*words, callbacks=[noise])[0]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_take_steps(precision: str) -> None:
    meta = Meta()
    module, trainer = trained("regularizer.every=1", "negatives=patch", callbacks=[meta], precision=precision)
    assert trainer.global_step == 2
    assert float(trainer.callback_metrics["loss"]) > 0
    assert all(call["method stays"] for call in meta.calls)
    (kind,) = {p.dtype for p in module.parameters()}
    assert kind == (torch.float64 if precision == "64-true" else torch.float32)
