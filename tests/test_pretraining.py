"""The training loop: what moves, when, and that nothing else does."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import AfterBatch, trained
from torch import Tensor, nn

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
            call = {"index": views.index, "step": step.index, "inner": inner and {n: g.clone() for n, g in inner.items()}}
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


def test_negatives_change_the_loss() -> None:
    for method in ("simclr", "moco", "byol"):
        losses = {
            choice: float(
                trained(f"method={method}", "regularizer=none", f"negatives={choice}", limit_train_batches=1)[
                    1
                ].callback_metrics["loss"]
            )
            for choice in ("none", "patch")
        }
        assert losses["none"] != losses["patch"]
