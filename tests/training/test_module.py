"""The training loop: what moves, when, and that nothing else does."""

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from support.ranks import Ranks
from support.tiny import AfterBatch, trained
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from icl_msr.core.distributed import rank, world_size
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import unit
from icl_msr.methods import Method, MoCo, Output, SimCLR, Step, Targets
from icl_msr.methods.base import Pair
from icl_msr.negatives import PatchNegatives
from icl_msr.regularizers import MetaSemanticRegularizer, Pass
from icl_msr.regularizers.bilevel import meta_pass, norm
from icl_msr.training import monitors
from icl_msr.training.module import Pretraining
from icl_msr.training.monitors import similarities

State = dict[str, Tensor]
DROPOUT = ("backbone=timm", "backbone.name=test_vit", "+backbone.options.proj_drop_rate=0.5")
LEARNED = ("meta", "uniform_only", "joint")


def state(module: nn.Module | None) -> State:
    """Parameters and buffers, copied."""
    values = {} if module is None else {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach().clone() for name, value in values.items()}


def equal(first: State, second: State) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def regularizer_of(module: Pretraining) -> MetaSemanticRegularizer:
    assert isinstance(module.regularizer, MetaSemanticRegularizer)
    return module.regularizer


class Meta(pl.Callback):
    """Every meta step: what it was handed, what it should have been handed, and whether the method stayed as it was."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.micro_batches: list[Pass] = []
        """Those before the one that makes the step."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        regularizer, plain = regularizer_of(pl_module), regularizer_of(pl_module).meta_step

        def meta_step(
            method: Method,
            views: Views,
            targets: Targets,
            step: Step,
            inner: Any,
            lr: float,
            features: Any = None,
            precision: torch.dtype | None = None,
        ) -> Any:
            call: dict[str, Any] = {"index": views.index, "step": step.index, "inner": inner}
            if inner is not None:
                call["inner"] = {name: g.clone() for name, g in inner.items()}
                with meta_pass(method, torch.device("cpu")):
                    parts = [
                        regularizer.inner_gradient(method, batch.views, batch.targets, batch.step)
                        for batch in [*self.micro_batches, pl_module.latest]
                    ]
                call["expected"] = {name: sum(part[name] for part in parts) / len(parts) for name in inner}
            before = state(method)
            log = plain(method, views, targets, step, inner, lr, features, precision)
            self.calls.append(call | {"method stays": equal(state(method), before)})
            self.micro_batches = []
            return log

        regularizer.meta_step = meta_step  # type: ignore[method-assign, assignment]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            self.micro_batches.append(pl_module.latest)


@pytest.fixture
def start() -> AfterBatch:
    """The state before the first batch."""

    class Start(AfterBatch):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.seen.append(self.look(pl_module))

        def on_train_batch_end(self, *_: Any) -> None:
            pass

    return Start(lambda module: (state(module.method), state(module.regularizer)))


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


def test_alpha_follows_its_schedule() -> None:
    """2 epochs of 2 batches: the loss sees 0, 1/4, 2/4, 3/4 of alpha."""
    look = AfterBatch(lambda module: module.latest.targets.negatives if module.latest else None)
    words = ("method=moco", "regularizer=msr", "negatives=patch", "negatives.alpha_schedule=linear")
    trained(*words, callbacks=[look], max_epochs=2)
    assert [(seen.alpha, seen.repulsion) for seen in look.seen] == [(2.0 * k / 4, 0.25 * k / 4) for k in range(4)]


def draw_pairs(n: int, bank: int | None, first: int = 0) -> tuple[list[Pair], list[Tensor]]:
    """Two directions of n anchors from the `first` on, and two negatives for each of them; this rank's part."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, 5, generator=generator, dtype=torch.float64)

    shared = None if bank is None else rows(bank)
    part = (torch.arange(n) + first)[rank() * n // world_size() : (rank() + 1) * n // world_size()] % n
    pairs = [Pair(rows(n)[part], rows(n)[part], rows(n)[part], nn.Identity(), shared) for _ in range(2)]
    return pairs, [rows(n, 2)[part] for _ in range(2)]


@pytest.mark.parametrize("bank", [None, 250])
@pytest.mark.parametrize("anchors", [120, 7])
def test_similarities_are_those_of_each_anchor(bank: int | None, anchors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchor by anchor, and other by other; of the first ones alone where all would be too many."""
    n = 120
    monkeypatch.setattr(monitors, "CHUNK", anchors * (bank or n))
    pairs, own = draw_pairs(n, bank)
    expected: dict[str, list[float]] = {"own": [], "positive": [], "others": [], "hardest": []}
    for pair, negatives in zip(pairs, own, strict=True):
        for i, anchor in enumerate(pair.anchor[:anchors]):
            others = [key for k, key in enumerate(pair.key) if k != i] if pair.bank is None else list(pair.bank)
            cosines = sorted(float(cosine_similarity(anchor, other, dim=0)) for other in others)
            expected["own"] += [float(cosine_similarity(anchor, t, dim=0)) for t in negatives[i]]
            expected["positive"].append(float(cosine_similarity(anchor, pair.key[i], dim=0)))
            expected["others"] += cosines
            expected["hardest"] += cosines[-2 if bank is None else -3 :]  # of 119 or of 250
    found = similarities(pairs, own)
    assert found.keys() == {f"negatives/similarity_{name}" for name in expected}
    for name, values in expected.items():
        assert float(found[f"negatives/similarity_{name}"]) == pytest.approx(sum(values) / len(values), abs=1e-12)


def similarities_here(bank: int | None, anchors: int, first: int = 0) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitors, "CHUNK", anchors * (bank or 120))
        return similarities(*draw_pairs(120, bank, first))


@pytest.mark.parametrize("bank", [None, 250])
@pytest.mark.parametrize("anchors", [60, 5])
def test_each_rank_looks_at_its_own_anchors(bank: int | None, anchors: int, two_ranks: Ranks) -> None:
    found = two_ranks(similarities_here, bank, anchors)
    for of_rank, first in zip(found, (0, 60), strict=True):
        for name, value in similarities_here(bank, anchors, first).items():
            torch.testing.assert_close(of_rank[name], value)


@pytest.mark.parametrize("method", ["simclr", "moco", "byol", "cmc"])
def test_similarities_are_logged_where_there_are_negatives(method: str) -> None:
    names = {f"negatives/similarity_{name}" for name in ("own", "positive", "others", "hardest")}
    for negatives in ("patch", "none"):
        words = [f"method={method}", "regularizer=none", f"negatives={negatives}"]
        _, trainer = trained(*words, limit_train_batches=1)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in names}
        assert logged.keys() == (names if negatives == "patch" else set())
        assert all(-1 <= value <= 1 for value in logged.values())
    _, trainer = trained(f"method={method}", "negatives=patch", limit_train_batches=1, log_every_n_steps=2)
    assert not names & trainer.callback_metrics.keys()


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
        # BYOL's momentum rises: at the second of two steps it is half way to 1.
        momentum = 0.9 if method == "moco" or batch < 2 else 0.95
        for name in followers:
            source = after[name.removeprefix("momentum_encoder.")]
            expected = momentum * before[name] + (1 - momentum) * source if steps else before[name]
            torch.testing.assert_close(after[name], expected)


def test_the_queue_takes_in_every_micro_batch() -> None:
    def look(module: Pretraining) -> tuple[int, int, Tensor]:
        assert isinstance(module.method, MoCo)
        queue = module.method.queue
        return module.global_step, int(queue.position), queue.keys[:24].clone()

    seen = AfterBatch(look)
    words = ("method=moco", "regularizer=none", "trainer.accumulate_grad_batches=2")
    module, _ = trained(*words, callbacks=[seen], limit_train_batches=4)
    # At a step, callbacks see the queue with the batch, since some of them write a checkpoint.
    assert [(step, position) for step, position, _ in seen.seen] == [(0, 0), (1, 16), (1, 16), (2, 32)]
    assert isinstance(module.method, MoCo)
    assert module.latest is not None
    assert int(module.method.queue.position) == 32
    torch.testing.assert_close(module.method.queue.keys[24:32], unit(module.latest.targets.embeddings[0]))


def test_strata_move_at_their_due_steps_only() -> None:
    """With accumulation too: an optimiser step is what counts."""
    meta, look = Meta(), AfterBatch(lambda module: state(module.regularizer))
    words = ("regularizer.every=2", "trainer.accumulate_grad_batches=2")
    _, trainer = trained(*words, callbacks=[meta, look], limit_train_batches=8)
    assert trainer.global_step == 4
    assert [call["step"] for call in meta.calls] == [0, 2]
    moved = [not equal(before, after) for before, after in itertools.pairwise(look.seen)]
    assert moved == [True, False, False, False, True, False, False]  # the second and the sixth batch end with a step


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("method", ["simclr", "moco", "byol"])
def test_the_meta_step_is_handed_the_ordinary_gradient(method: str, accumulated: int) -> None:
    """Complete, not yet clipped; and the meta step leaves the method alone."""
    meta = Meta()
    words = (f"method={method}", "regularizer.every=1", "trainer.gradient_clip_val=1e-4", "negatives=patch")
    trained(*words, f"trainer.accumulate_grad_batches={accumulated}", callbacks=[meta], limit_train_batches=4)
    assert len(meta.calls) == 4 / accumulated
    for call in meta.calls:
        assert call["method stays"]
        # MoCo's queue has moved since the first micro-batch.
        tolerance = 0.2 if method == "moco" and accumulated > 1 else 1e-4
        error = norm([call["inner"][name] - g for name, g in call["expected"].items()])
        assert error < tolerance * norm(call["expected"].values())
        assert norm(call["inner"].values()) > 1e-2


def test_the_per_epoch_schedule_moves_the_strata_alone(start: AfterBatch) -> None:
    meta = Meta()
    indices = AfterBatch(lambda module: module.latest and module.latest.views.index)
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


def test_no_image_is_its_own_negative_after_the_epoch() -> None:
    pushed: dict[tuple[float, ...], int] = {}
    shown: list[tuple[set[int], set[int]]] = []

    class Watch(pl.Callback):
        """Notes whose keys are in the queue, and which of them a meta step is shown."""

        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            plain = regularizer_of(pl_module).meta_step

            def meta_step(method: MoCo, views: Views, *rest: Any) -> Any:
                shown.append(
                    (set(views.index.tolist()), {pushed.get(tuple(key), -1) for key in method.queue.keys.tolist()})
                )
                return plain(method, views, *rest)

            regularizer_of(pl_module).meta_step = meta_step  # type: ignore[method-assign, assignment]

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            keys = unit(pl_module.latest.targets.embeddings[0]).tolist()
            pushed.update(zip(map(tuple, keys), pl_module.latest.views.index.tolist(), strict=True))

    words = ("method=moco", "regularizer=msr_paper", "method.queue_size=40")
    trained(*words, callbacks=[Watch()], limit_train_batches=4, max_epochs=1)
    assert len(shown) == 4
    for own, known in shown:
        assert not own & known
        assert len(known) >= 24


def test_the_learning_rate_follows_the_optimizer_steps() -> None:
    look = AfterBatch(lambda module: module.learning_rate())
    words = ("optimizer=sgd", "optimizer.lr=1.0", "schedule.scale_lr=linear", "schedule.warmup_steps=2")
    more = ("method=simclr", "regularizer=none", "trainer.accumulate_grad_batches=2")
    trained(*words, *more, callbacks=[look], limit_train_batches=4, max_epochs=2)
    effective = 16 / 256
    # After each batch, the rate of the next one: two warm-up steps, then a cosine over the other two.
    assert look.seen == pytest.approx([effective * factor for factor in (0.5, 1, 1, 1, 1, 0.5, 0.5, 0)])


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    words = ("method=moco", "negatives=patch", "regularizer.every=1")
    first, again, other = (state(trained(*words, f"seed={seed}")[0]) for seed in (3, 3, 4))
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize(
    "words",
    [
        ("method=byol", "regularizer.every=1", "negatives=patch"),
        ("method=simclr", "regularizer=none", *DROPOUT),
    ],
)
def test_the_random_state_outside_does_not_matter(words: tuple[str, ...]) -> None:
    """Every random number of the loop comes from the seed: a callback that draws some changes nothing."""
    noise = AfterBatch(lambda module: torch.rand(3))
    assert equal(state(trained(*words)[0]), state(trained(*words, callbacks=[noise])[0]))


def test_mixed_precision_takes_steps() -> None:
    meta = Meta()
    module, trainer = trained("regularizer.every=1", "negatives=patch", callbacks=[meta], precision="bf16-mixed")
    assert trainer.global_step == 2
    assert float(trainer.callback_metrics["loss"]) > 0
    assert all(call["method stays"] for call in meta.calls)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- numbers for the log


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A method and a generator of negatives with a number each. Returns who was asked for it, in order."""
    asked: list[str] = []
    plain = PatchNegatives.__call__

    def of_method(self: SimCLR, output: Output, targets: Targets) -> dict[str, Tensor]:
        asked.append("method")
        assert not torch.is_grad_enabled()
        return {"simclr/length": output.embeddings[0].norm(dim=1).mean()}

    def of_generator(self: PatchNegatives, query: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = plain(self, query, keys)
        return rows, {"negatives/brightness": rows.mean()}

    monkeypatch.setattr(SimCLR, "log", of_method)
    monkeypatch.setattr(PatchNegatives, "__call__", of_generator)
    return asked


def test_numbers_of_a_method_and_of_a_generator_are_logged(talkative: list[str], tmp_path: Path) -> None:
    """With no other file touched, they reach the loggers; the regularizer's repeated passes ask for none."""
    logger = CSVLogger(tmp_path)
    words = ("method=simclr", "negatives=patch", "regularizer.every=1", "regularizer.mode=exact")
    module, _ = trained(*words, limit_train_batches=4, log_every_n_steps=2, logger=logger)
    assert talkative == ["method", "method"]
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["simclr/length"]] == ["1", "3"]
    assert module.latest is not None
    views = module.latest.views
    assert views.negatives is not None
    assert float(rows[-1]["negatives/brightness"]) == pytest.approx(float(views.negatives.rows.mean()), rel=1e-5)


def test_logging_changes_nothing(talkative: list[str]) -> None:
    words = ("method=simclr", "negatives=patch", "regularizer.every=1")
    often, never = (trained(*words, limit_train_batches=4, log_every_n_steps=n)[0] for n in (1, 0))
    assert equal(state(often), state(never))
    assert len(talkative) == 4
