"""The contract of a regularizer: what training asks of any, and what it gives to any."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.ranks import Ranks
from support.tiny import composed, pieces, trained
from support.toys import make_method, make_views
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from icl_msr.core.views import Views
from icl_msr.methods import Output, Step
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.regularizers import Pass, Regularizer
from icl_msr.regularizers.bilevel import trainable
from icl_msr.training.module import Pretraining

PACKAGE = {
    "__init__.py": "",
    "small.py": '''
import torch
from pydantic import PositiveFloat
from icl_msr.regularizers import Regularizer

class Small(Regularizer):
    """Features stay small."""

    def __init__(self, *, weight: PositiveFloat):
        super().__init__()
        self.weight = weight

    def forward(self, views, output, step):
        size = torch.cat(output.features).square().mean()
        output.log["small/size"] = size.detach()
        return self.weight * size
''',
    "conf/regularizer/small.yaml": "_target_: theirs.small.Small\nweight: 2.0\n",
}


def test_a_regularizer_of_a_users_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one YAML: it is composed, trained with and logged."""
    for name, text in PACKAGE.items():
        file = tmp_path / "theirs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = ("hydra.searchpath=[pkg://theirs.conf]", "regularizer=small", "method=simclr", "optimizer.lr=0.01")
    assert composed(*words).regularizer == {"_target_": "theirs.small.Small", "weight": 2.0}
    sizes = []
    for weight in (0.01, 100.0):
        _, trainer = trained(*words, f"regularizer.weight={weight}", limit_train_batches=8)
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        expected = logged["loss/contrastive"] + weight * logged["small/size"]
        assert logged["loss"] == pytest.approx(expected, rel=1e-6)
        sizes.append(logged["small/size"])
    assert sizes[1] < sizes[0] / 2


class Watchful(Regularizer):
    """Notes what it is handed. Has a parameter of its own, which doubles when it is its turn."""

    def __init__(self, passes: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.passes = passes
        self.seen: list[tuple[str, Any]] = []

    def forward(self, views: Views, output: Output, step: Step) -> Tensor:
        self.seen.append(("forward", (views.index.tolist(), step.logs)))
        return self.scale.detach() * output.features[0].mean()

    def before_step(self, batch: Pass) -> dict[str, Tensor]:
        with torch.no_grad():
            self.scale *= 2
        gradient = torch.cat([p.grad.flatten() for p in trainable(batch.method).values() if p.grad is not None])
        assert batch.output is not None
        self.seen.append(("before_step", (batch.views.index.tolist(), batch.step.index, gradient)))
        return {"watchful/scale": self.scale.detach()}

    def after_epoch(self, batches: Iterable[Pass]) -> dict[str, Tensor]:
        for _, batch in zip(range(self.passes), batches, strict=False):
            assert batch.output is None
            self.seen.append(("after_epoch", (batch.views.index.tolist(), batch.step.index)))
        return {"watchful/passes": torch.tensor(float(self.passes))}

    def of(self, verb: str) -> list[Any]:
        return [what for name, what in self.seen if name == verb]


def watched(*words: str, passes: int = 0, **keys: Any) -> tuple[Pretraining, Watchful, Any]:
    """The module that was trained with a `Watchful`, which `trained` cannot build, and its trainer."""
    watchful = Watchful(passes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            tiny, "Pretraining", lambda method, _, *rest, **keys: Pretraining(method, watchful, *rest, **keys)
        )
        module, trainer = trained("method=moco", "regularizer=none", *words, **keys)
    return module, watchful, trainer


def test_verbs_are_called_when_the_contract_says() -> None:
    """Two micro-batches a step: a loss for each, a step of its own for both, a second pass at the end of the epoch."""
    words = ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1e-4")
    _, watchful, trainer = watched(*words, passes=3, limit_train_batches=4, log_every_n_steps=2)
    batches = [index for index, _ in watchful.of("forward")]
    assert [logs for _, logs in watchful.of("forward")] == [False, False, True, True]
    assert [(index, step) for index, step, _ in watchful.of("before_step")] == [(batches[1], 0), (batches[3], 1)]
    assert all(gradient.norm() > 1e-3 for *_, gradient in watchful.of("before_step"))  # not yet clipped
    assert watchful.of("after_epoch") == [(index, 2) for index in batches[:3]]
    assert [name for name, _ in watchful.seen[-3:]] == ["after_epoch"] * 3
    assert watchful.scale == 4
    assert {"watchful/scale": 4.0, "watchful/passes": 3.0}.items() <= {
        name: float(value) for name, value in trainer.callback_metrics.items()
    }.items()


def test_no_batch_is_loaded_again_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icl_msr.training.datamodule.DataModule.epoch", lambda *_: pytest.fail("loaded"))
    watched()


def test_its_parameters_are_its_own() -> None:
    """They travel in the state dict, and the method's optimiser does not have them."""
    module, watchful, trainer = watched()
    assert module.state_dict()["regularizer.scale"] == watchful.scale
    (optimizer,) = trainer.optimizers
    assert all(p is not watchful.scale for group in optimizer.param_groups for p in group["params"])


def test_the_shortest_regularizer_needs_no_verb() -> None:
    class Nothing(Regularizer):
        def forward(self, views: Views, output: Output, step: Step) -> Tensor:
            return output.loss.new_zeros(())

    nothing, method, views = Nothing(), make_method("simclr"), make_views()
    batch = Pass(method, views, method.targets(views), Step(0, 10), 0.1)
    assert nothing.before_step(batch) == {}
    assert nothing.after_epoch([batch]) == {}


def gradient_of_its_own() -> float | None:
    """What DDP leaves of the rank's gradient of a regularizer's parameter."""
    _, module, _ = pieces("method=simclr", "regularizer=none")
    regularizer = Watchful()
    module = Pretraining(global_batch_norm(module.method), regularizer, module.optimization, seed=0, batch_size=8)
    rank = torch.distributed.get_rank()

    parallel = DistributedDataParallel(module, broadcast_buffers=False)
    module.forward = lambda x: sum(p.sum() for p in module.method.parameters()) + x * regularizer.scale  # type: ignore
    parallel(torch.tensor(float(rank + 1))).backward()
    return None if regularizer.scale.grad is None else float(regularizer.scale.grad)


def test_ddp_leaves_its_gradients_alone(two_ranks: Ranks) -> None:
    """Each rank has its own; what is exchanged, and when, is the regularizer's affair."""
    assert two_ranks(gradient_of_its_own) == [1.0, 2.0]
