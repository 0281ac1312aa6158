"""Measure the cost of the modes of the meta gradient, and how well they agree with the exact one.

python experiments/msr/modes.py agreement [key=value ...]     over a whole run, against exact, at the same states
python experiments/msr/modes.py signal [key=value ...]        over a whole run, how much of it other views repeat
python experiments/msr/modes.py speed [BACKBONE=resnet18] [BATCH=64] [PRECISION=auto] [LAYOUT=cl] [ROUNDS=5]
                                                              time and memory of a step, in one run, alternating

The first two take the arguments of `python -m icl_msr.run`. All print a table and write it as CSV into the folder
`--to`, by default the folder of this file. `--tiny` uses the smallest sizes, to check that everything runs.
"""

import argparse
import copy
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from experiments.benchmarks.timing import alternate
from icl_msr.cli.assemble import assemble
from icl_msr.core.config import build, check, config_dir
from icl_msr.core.tables import csv_text
from icl_msr.core.views import Views
from icl_msr.methods import Step
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.regularizers.bilevel import meta_pass, norm, replay, trainable
from icl_msr.regularizers.strata import uniformity
from icl_msr.training.datamodule import Batch, DataModule
from icl_msr.training.hardware import Plan
from icl_msr.training.module import Pretraining

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"mode": "exact"},
    "difference h=1e-5, v in bf16": {"mode": "difference", "difference_step": 1e-5, "precision": torch.bfloat16},
    "difference h=1e-6": {"mode": "difference", "difference_step": 1e-6},
    "difference h=1e-3": {"mode": "difference", "difference_step": 1e-3},
    "difference h=1e-4": {"mode": "difference", "difference_step": 1e-4},
    "difference h=1e-5": {"mode": "difference", "difference_step": 1e-5},
    "near_free": {"mode": "near_free"},
    "exact, last_stage": {"mode": "exact", "scope": "last_stage"},
    "exact, projector": {"mode": "exact", "scope": "projector"},
}
STEPS = (0.0003, 0.001, 0.003, 0.01, 0.03)
"""Relative virtual steps r at which the approximations are compared. The run itself uses its own."""

TINY = "dataset.train=16 dataset.test=16 dataset.balanced=16 dataset.cache=null loader.batch_size=16 method=simclr"
TINY += " schedule.warmup_steps=0 trainer.max_epochs=1 trainer.limit_train_batches=1 evaluation=none metric=loss"
TINY += " hardware.precision=32-true regularizer=msr"


def variant(regularizer: MetaSemanticRegularizer, **keys: Any) -> MetaSemanticRegularizer:
    """Return the same f_msr with other keys."""
    other = copy.copy(regularizer)
    for key, value in keys.items():
        assert hasattr(other, key)
        setattr(other, key, value)
    return other


class Agreement(pl.Callback):
    """Every few steps, computes the meta gradient of all variants at the same state."""

    def __init__(self, every: int, steps: Sequence[float]):
        self.every, self.steps = every, steps
        self.rows: list[dict[str, Any]] = []

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, Pretraining)
        batch, regularizer = pl_module.latest, pl_module.regularizer
        if trainer.global_step % self.every or batch is None or not isinstance(regularizer, MetaSemanticRegularizer):
            return
        method = pl_module.method
        inner = {name: p.grad for name, p in trainable(method).items() if p.grad is not None}
        for r in self.steps:
            found = {}
            for name, keys in VARIANTS.items():
                keys = dict(keys)
                precision = keys.pop("precision", None)
                other = variant(regularizer, relative_step=r, **keys)
                with meta_pass(method, pl_module.device):
                    alpha = other.step_size(method, inner, 0.0)
                    parts = other.meta_gradient(
                        method, batch.views, batch.targets, batch.step, inner, alpha, precision=precision
                    )
                found[name] = torch.cat([part.flatten() for part in parts]).double()
            exact = found["exact"]
            with meta_pass(method, pl_module.device), torch.no_grad():
                theta = trainable(method)
                alpha = variant(regularizer, relative_step=r).step_size(method, inner, 0.0)
                virtual = {name: p - alpha * inner[name] for name, p in theta.items()}
                before, after = (
                    replay(method, batch.views, batch.targets, batch.step, at).loss for at in (theta, virtual)
                )
            for name, gradient in found.items():
                size, whole = float(norm([gradient])), float(norm([exact]))
                cosine, ratio = float(gradient @ exact) / (size * whole), size / whole
                row = {"step": trainer.global_step, "r": r, "variant": name, "cosine": cosine, "norm_ratio": ratio}
                self.rows.append({**row, "norm": size, "outer_change": float(after - before)})


class Signal(pl.Callback):
    """Every few steps, computes the meta gradient from other views of the same images, at the same state.

    The part of a gradient that changes with the draw of the views is noise. f_msr can learn nothing from it.
    """

    def __init__(self, every: int, steps: Sequence[float], data: DataModule):
        self.every, self.steps, self.data = every, steps, data
        self.rows: list[dict[str, Any]] = []

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, Pretraining)
        batch, regularizer, method = pl_module.latest, pl_module.regularizer, pl_module.method
        if trainer.global_step % self.every or batch is None or not isinstance(regularizer, MetaSemanticRegularizer):
            return
        index = batch.views.index
        with torch.no_grad():
            strata = regularizer.strata(batch.views.images)
        draws = [self.data.views(Batch(1000 + draw, index)) for draw in range(4)]
        with meta_pass(method, pl_module.device):
            apart = strata.clone().requires_grad_()
            phi = list(regularizer.phi.values())
            spread = uniformity(regularizer.strata(batch.views.images), regularizer.u)
            uniform = norm(torch.autograd.grad(spread, phi, materialize_grads=True))
            for r in (*self.steps, "lr"):
                keys: dict[str, Any] = {"alpha": "lr"} if r == "lr" else {"alpha": "relative", "relative_step": r}
                other = variant(regularizer, **keys)
                whole, each = [], []
                for views in draws:
                    targets = method.targets(views)
                    inner = other.inner_gradient(method, views, targets, batch.step)
                    alpha = other.step_size(method, inner, pl_module.learning_rate())
                    arguments = (method, views, targets, batch.step, inner, alpha)
                    whole.append(torch.cat([g.flatten() for g in other.meta_gradient(*arguments)]))
                    each.append(by_strata(other, arguments, apart))
                row = {"step": trainer.global_step, "r": r, "phi": agreement_of(torch.stack(whole)[:, None])}
                row |= {"image": agreement_of(torch.stack(each)), "ratio": float(norm([whole[0]]) / uniform)}
                self.rows.append(row)


def by_strata(regularizer: MetaSemanticRegularizer, arguments: Any, strata: torch.Tensor) -> torch.Tensor:
    """Return the meta gradient with respect to A(X), (N, S c): the change that each image asks of its strata."""
    alone = copy.copy(regularizer)
    alone.__dict__.update(strata=lambda images: strata)
    alone.__dict__.update(network=SimpleNamespace(named_parameters=lambda: [("A", strata)]))
    alone._modules = {}
    return alone.meta_gradient(*arguments)[0].flatten(1)


def agreement_of(draws: torch.Tensor) -> float:
    """Return the mean cosine of two draws of (draws, N, D), over all pairs of draws and all N."""
    unit = torch.nn.functional.normalize(draws.double(), dim=-1)
    count = len(draws)
    return float((unit.sum(0).square().sum(-1).mean() - count) / (count * (count - 1)))


def watched(words: list[str], make: Callable[[int, DataModule], Any]) -> tuple[Any, str, Plan]:
    """Train one run with a callback that observes it twelve times and does not change it."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = check(compose("config", overrides=words))
    plan: Plan = build(settings.hardware).plan()
    pieces = assemble(settings, plan)
    watch = make(max(1, int(pieces.derived["total_steps"]) // 12), pieces.data)
    trainer = pl.Trainer(
        accelerator=plan.accelerator,
        devices=1,
        precision=plan.precision,
        max_epochs=settings.trainer["max_epochs"],
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(pieces.module, pieces.data)
    return watch, type(pieces.module.method).__name__.lower(), plan


def signal(words: list[str], to: Path, steps: Sequence[float]) -> None:
    """Measure the size of the meta signal against uniformity's and against its own noise."""
    watch, method, plan = watched(words, lambda every, data: Signal(every, steps, data))
    write(to / f"signal_{method}.csv", watch.rows)
    looks = len(watch.rows) // (len(steps) + 1)
    table = Table(title=f"{' '.join(words)}, {plan}: 4 draws of the views at {looks} steps; median (range)")
    for column in ("r", "|meta| / |uniformity|", "cosine of two draws: phi", "of an image's A"):
        table.add_column(column)
    for r in (*steps, "lr"):
        rows = [row for row in watch.rows if row["r"] == r]
        cells = []
        for key in ("ratio", "phi", "image"):
            values = [row[key] for row in rows]
            cells.append(f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        table.add_row(str(r), *cells)
    Console(width=130).print(table)


def agreement(words: list[str], to: Path, steps: Sequence[float]) -> None:
    """Measure how close the cheaper modes are to the exact gradient."""
    watch, method, plan = watched(words, lambda every, _: Agreement(every, steps))
    write(to / f"agreement_{method}.csv", watch.rows)
    table = Table(title=f"{' '.join(words)}, {plan}: {len(watch.rows) // len(VARIANTS) // len(steps)} looks at a run")
    for column in (
        "r",
        "variant",
        "cosine: median",
        "min",
        "first",
        "norm ratio: median",
        "L_ct(theta') - L_ct: median",
    ):
        table.add_column(column)
    for r in steps:
        for name in VARIANTS:
            rows = [row for row in watch.rows if row["r"] == r and row["variant"] == name]
            cosines = [row["cosine"] for row in rows]
            ratio = statistics.median(row["norm_ratio"] for row in rows)
            change = statistics.median(row["outer_change"] for row in rows)
            values = (statistics.median(cosines), min(cosines), cosines[0])
            table.add_row(f"{r:g}", name, *(f"{value:.5f}" for value in values), f"{ratio:.3f}", f"{change:+.4f}")
        table.add_section()
    Console(width=130).print(table)


SPEED: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "L_msr, no meta step": {"every": 0},
    "double_backward": {"mode": "double_backward"},
    "exact": {"mode": "exact"},
    "difference": {"mode": "difference"},
    "near_free": {"mode": "near_free"},
    "exact, last_stage": {"mode": "exact", "scope": "last_stage"},
    "exact, projector": {"mode": "exact", "scope": "projector"},
    "exact, every=4": {"mode": "exact", "every": 4},
    "difference, every=4": {"mode": "difference", "every": 4},
}


Stepper = Callable[[dict[str, Any] | None, int], None]


def stepper(backbone_name: str, batch: int, precision: str, layout: str, size: int = 32) -> tuple[Plan, Stepper]:
    """Build a SimCLR step without and with each mode: forward, backward, phi's step and Adam."""
    words = [f"backbone={backbone_name}", "method=simclr", "regularizer=msr", f"hardware.precision={precision}"]
    words += [f"hardware.channels_last={layout != 'nchw'}"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = check(compose("config", overrides=words))
    plan: Plan = build(settings.hardware).plan()
    torch.manual_seed(0)
    backbone = build(settings.backbone, image_size=size)
    method = build(settings.method, backbone=backbone, classes=10, mean=(0.5,) * 3, std=(0.25,) * 3).to(plan.device)
    regularizer = build(settings.regularizer, channels=backbone.channels, method_temperature=method.temperature).to(
        plan.device
    )
    images = [torch.randn(batch, 3, size, size, device=plan.device) for _ in range(3)]
    if plan.channels_last:
        method.to(memory_format=torch.channels_last)
        images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    index = torch.arange(batch, device=plan.device)
    views, optimizer = Views(images[0], images[1:], index, index), torch.optim.Adam(method.parameters(), 1e-4)

    def step(keys: dict[str, Any] | None, number: int) -> None:
        other = None if keys is None else variant(regularizer, **keys)
        with torch.autocast(plan.device.type, torch.bfloat16, enabled="bf16" in plan.precision):
            targets = method.targets(views)
            output = method(views, targets, Step(0, 1))
            loss = output.loss + (0 if other is None else other(views, output, Step(0, 1)))
        optimizer.zero_grad()
        loss.backward()
        if other is not None and other.every and number % other.every == 0:
            inner = {name: p.grad for name, p in trainable(method).items() if p.grad is not None}
            features = output.features if plan.precision == "32-true" else None
            mixed = torch.bfloat16 if plan.precision == "bf16-mixed" else None
            other.meta_step(method, views, targets, Step(0, 1), inner, 1e-3, features, mixed)
        optimizer.step()

    return plan, step


def speed(to: Path, backbone: str, batch: int, precision: str, layout: str, rounds: int) -> None:
    """Measure the steps of `SPEED`, as means over a cycle of `every`. Memory is measured in separate processes."""
    plan, step = stepper(backbone, batch, precision, layout)
    cycles = {name: int((keys or {}).get("every") or 1) for name, keys in SPEED.items()}

    def cycle(name: str) -> Callable[[], object]:
        return lambda: [step(SPEED[name], number) for number in range(cycles[name])]

    taken = alternate({name: cycle(name) for name in SPEED}, rounds=rounds, limit=math.inf, device=plan.device)
    seconds = {name: [value / cycles[name] for value in values] for name, values in taken.items()}
    memory = {}
    for name in SPEED:
        command = [sys.executable, __file__, "memory", backbone, str(batch), precision, layout, name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    table = Table(title=f"SimCLR, {backbone}, batch {batch}, 32 px, {plan}, {rounds} alternating rounds")
    for column in ("step", "seconds", "time: ratio to plain", "range", "memory, MB", "ratio to plain"):
        table.add_column(column, justify="left" if column == "step" else "right")
    rows = []
    for name, values in seconds.items():
        ratios = [s / plain for s, plain in zip(values, seconds["plain"], strict=True)]
        ratio, median = statistics.median(ratios), statistics.median(values)
        rows.append({"step": name, "seconds": median, "time_ratio": ratio, "memory_mb": memory[name]})
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        cells = (
            f"{median:.3f}",
            f"{ratio:.2f}",
            spread,
            f"{memory[name]:.0f}",
            f"{memory[name] / memory['plain']:.2f}",
        )
        table.add_row(name, *cells)
    Console(width=120).print(table)
    write(to / f"speed_{backbone}_{batch}_{plan.precision}_{layout}.csv", rows)


def memory(backbone: str, batch: int, precision: str, layout: str, name: str) -> None:
    """Print by how many MB two steps raise the peak of memory above the model, its data and the libraries."""
    plan, step = stepper(backbone, batch, precision, layout)
    if plan.accelerator == "gpu":
        before = torch.cuda.memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = resident("VmRSS")
    for _ in range(2):
        step(SPEED[name], 0)
    peak = torch.cuda.max_memory_allocated() / 1e6 if plan.accelerator == "gpu" else resident("VmHWM")
    print(peak - before)


def resident(field: str) -> float:
    """Return the memory of this process in MB: VmRSS is the current value, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) / 1e3


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV."""
    cells = [[float(f"{v:.6g}") if isinstance(v, float) else v for v in row.values()] for row in rows]
    path.write_text(csv_text([rows[0], *cells]))


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("agreement", "signal", "speed", "memory"))
    parser.add_argument("words", nargs="*")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_intermixed_args(words)
    if options.what == "memory":
        backbone, batch, precision, layout, name = options.words
        memory(backbone, int(batch), precision, layout, name)
    elif options.what == "speed":
        usual = ("tiny", "4", "32-true", "cl", "1") if options.tiny else ("resnet18", "64", "auto", "cl", "5")
        given = tuple(map(str, options.words))
        backbone, batch, precision, layout, rounds = given + usual[len(given) :]
        speed(options.to, backbone, int(batch), precision, layout, int(rounds))
    else:
        chosen = [*(TINY.split() if options.tiny else []), *options.words]
        measure = {"agreement": agreement, "signal": signal}[options.what]
        measure(chosen, options.to, STEPS[:1] if options.tiny else STEPS)


if __name__ == "__main__":
    main()
