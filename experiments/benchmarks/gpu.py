"""Check that the package is correct on a GPU and measure its speed. The most important rows come first.

python experiments/benchmarks/gpu.py --out FOLDER [--budget SECONDS] [--only NAME ...] [--dry-run]

* Correctness: random numbers and views of CPU and GPU; one step of every method with MSR and patch negatives against
  the same in float64; a step that may not wait for the GPU; training that goes on from a checkpoint.
* Speed: steps of SimCLR and MoCo with ResNet-18 on 50,000 images of 32 px that lie on the device, in bf16 and
  channels_last, with and without MSR, negatives and torch.compile; ResNet-50 at 224 px; lightly, if it is installed.

FOLDER/gpu.json and gpu.md are written after every row. A row that was left out for lack of time says so. A ratio
compares two medians of alternating repetitions. `--dry-run` runs everything with tiny networks and few images, also on
a CPU. The script needs torch, torchvision, pytorch_lightning, pydantic, omegaconf and safetensors.
"""

import argparse
import io
import itertools
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor, nn
from typing_extensions import override

from icl_msr.core.config import build, config_dir
from icl_msr.core.randomness import integers, keys, permutation, uniforms
from icl_msr.core.views import Views
from icl_msr.data.dataset import ArraySplit, Dataset
from icl_msr.methods import Method, Step
from icl_msr.regularizers import MetaSemanticRegularizer, Pass, ordinary_gradient
from icl_msr.training.datamodule import Batch, DataModule
from icl_msr.training.module import Pretraining
from icl_msr.training.optimization import Optimization, cosine

Result = dict[str, Any]
Step_ = Callable[[], Any]

METHODS = sorted(file.stem for file in (config_dir() / "method").glob("*.yaml"))
FIRST = ["simclr", "moco", "byol"]
EPOCH = 50_000
"""Images of the epoch to which the time of a step is scaled."""
RATE = 0.03
"""Learning rate of theta's SGD."""


def node(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """Return the values of one YAML file, with changes, without Hydra."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{name}.yaml"))
    values = loaded.get(group, loaded)  # some methods have their own views
    return {**values, **({"seed": 0} if "seed" in values else {}), **changes}


@dataclass
class Scale:
    """Sizes of the measurements. The dry run uses small ones."""

    backbone: str
    photo_backbone: str
    images: int
    batches: tuple[int, int]
    photos: int
    photo_batch: int
    photo_size: tuple[int, int]
    """Side in pixels of the stored images and of the views."""
    compared: int
    """Images of a step that is compared with the CPU."""
    drawn: int
    seconds: float
    """Seconds of a repetition."""
    repeats: int
    cycles: int
    """Largest number of cycles in a repetition."""
    cycle: int
    """Steps of a cycle: the default of MSR's `every`."""
    workers: int
    methods: list[str]


REAL = Scale("resnet18", "resnet50", EPOCH, (512, 1024), 4096, 256, (256, 224), 64, EPOCH, 0.5, 5, 10, 4, 15, METHODS)
DRY = Scale("tiny", "tiny", 64, (8, 16), 16, 4, (40, 32), 8, 100, 0.0, 1, 1, 1, 0, [*FIRST, "wmse"])


class Bench:
    """The device, the scale, and parts that several rows share."""

    def __init__(self, device: torch.device, scale: Scale, dry: bool) -> None:
        self.device, self.scale, self.dry = device, scale, dry
        self.gpu = device.type == "cuda"
        self.small = self.images(scale.images, 32, device)
        self.plain: dict[tuple[str, int], Training] = {}

    @staticmethod
    def images(count: int, size: int, device: torch.device, views: int | None = None) -> Dataset:
        """Return a data set of smooth random pictures: noise of low resolution, enlarged."""
        generator = torch.Generator(device).manual_seed(0)
        parts = []
        for start in range(0, count, 1024):
            coarse = torch.rand(min(1024, count - start), 3, 8, 8, device=device, generator=generator)
            parts.append(nn.functional.interpolate(coarse, size=size, mode="bicubic").mul(255).clamp(0, 255).byte())
        labels = torch.arange(count, device=device) % 10
        split = ArraySplit(torch.cat(parts), labels)
        return Dataset("noise", [str(k) for k in range(10)], views or size, split, {"test": split})

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.gpu:
            torch.cuda.synchronize()

    def method(self, name: str, backbone: str, size: int = 32) -> Method:
        """Build a method with the values of its YAML file, on the CPU, from seed 0."""
        torch.manual_seed(0)
        changes = {"whitening_size": 2 * 4, "embedding_dim": 4} if name == "wmse" and self.scale.compared < 128 else {}
        encoder = build(node("backbone", backbone), image_size=size)
        facts = {"classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}
        method: Method = build(node("method", name, **changes), backbone=encoder, **facts)
        return method

    def regularizer(self, method: Method, **changes: Any) -> MetaSemanticRegularizer:
        """Build f_msr on the CPU, from seed 0."""
        torch.manual_seed(1)
        given = {"channels": method.channels, "method_temperature": method.temperature}
        return build(node("regularizer", "msr", **changes), **given)  # type: ignore[no-any-return]

    def data(self, dataset: Dataset, batch: int, negatives: str = "none") -> DataModule:
        """Build the data module, with batches of views as in a run."""
        parts = build(node("augment", "simclr")), build(node("negatives", negatives))
        return DataModule(dataset, *parts, batch_size=batch, num_workers=0, seed=0, channels_last=True)

    def training(
        self,
        method: str,
        batch: int,
        *,
        msr: dict[str, Any] | None = None,
        negatives: str = "none",
        backbone: str | None = None,
        dataset: Dataset | None = None,
    ) -> "Training":
        """Build a training loop with all parts on the device."""
        dataset = dataset or self.small
        built = self.method(method, backbone or self.scale.backbone, dataset.image_size)
        regularizer = None if msr is None else self.regularizer(built, **msr)
        return Training(built, regularizer, self.data(dataset, batch, negatives), self.device, self.gpu)

    def plain_training(self, method: str, batch: int) -> "Training":
        """Return a training loop without regularizer and negatives. It is kept, as the reference of several rows."""
        if (method, batch) not in self.plain:
            self.plain[method, batch] = self.training(method, batch)
        return self.plain[method, batch]


class Training:
    """A training loop with the stages of a run: views, targets, loss, penalty, gradients, phi's step, theta's step."""

    def __init__(
        self,
        method: Method,
        regularizer: MetaSemanticRegularizer | None,
        data: DataModule,
        device: torch.device,
        mixed: bool,
    ) -> None:
        self.device, self.data, self.mixed = device, data, mixed
        self.method = method.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.regularizer = None if regularizer is None else regularizer.to(device)
        parameters = [p for p in method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, RATE, momentum=0.9, weight_decay=1e-4)
        self.count = 0
        self.order = permutation(0, 0, len(data.dataset.train))
        if device.type == "cuda":
            self.order = self.order.pin_memory()

    def views(self) -> Views:
        """Return the views of the next batch."""
        size = self.data.batch_size
        start = self.count * size % (len(self.order) - size + 1)
        index = self.order[start : start + size].to(self.device, non_blocking=True)
        return self.data.views(Batch(0, index))

    def step(self, mark: Callable[[str], object] = lambda stage: None) -> Tensor:
        """Train on one batch and return the loss. `mark` is called with the name of each stage when it begins."""
        method, regularizer = self.method, self.regularizer
        step = Step(self.count, 100_000, noise=self.count)
        mark("views")
        views = self.views()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            mark("targets")
            targets = method.targets(views)
            torch.manual_seed(step.noise)
            mark("forward")
            output = method(views, targets, step)
            loss = output.loss
            if regularizer is not None:
                mark("L_msr")
                loss = loss + regularizer(views, output, step)
        mark("backward")
        loss.backward()
        if regularizer is not None:
            mark("phi's step")
            precision = torch.bfloat16 if self.mixed else None
            regularizer.before_step(Pass(method, views, targets, step, RATE, precision, output))
        mark("theta's step")
        self.optimizer.step()
        self.optimizer.zero_grad()
        method.observe(targets, [embedding.detach() for embedding in output.embeddings])
        method.advance(step)
        self.count += 1
        mark("end")
        detached: Tensor = loss.detach()
        return detached

    def state(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        phi = {} if self.regularizer is None else self.regularizer.state_dict()
        method, optimizer = self.method.state_dict(), self.optimizer.state_dict()
        return {"method": method, "regularizer": phi, "optimizer": optimizer, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.method.load_state_dict(state["method"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.count = state["count"]


def relative(value: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return |value - reference| / |reference|, with all tensors taken as one vector."""
    value_, reference_ = (torch.cat([t.detach().cpu().double().flatten() for t in many]) for many in (value, reference))
    return float((value_ - reference_).norm() / reference_.norm().clamp(min=1e-300))


def tensors(state: Any) -> list[Tensor]:
    """Return all tensors inside a nested state."""
    if isinstance(state, Tensor):
        return [state]
    inside: Sequence[Any] = (
        list(state.values()) if isinstance(state, dict) else state if isinstance(state, list) else []
    )
    return [tensor for part in inside for tensor in tensors(part)]


def equal(first: Any, second: Any) -> bool:
    """Return True if two states are equal bit by bit."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def settings(*, tf32: bool, deterministic: bool = False, benchmark: bool = False) -> Iterator[None]:
    """Set options of the whole process, and restore them afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = tf32, tf32, deterministic, benchmark
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------- correctness


def draws(bench: Bench) -> Result:
    """Compare random numbers, crops, views and negatives of CPU and device."""
    index = torch.arange(bench.scale.drawn)
    found: Result = {}
    there = index.to(bench.device)
    same = True
    for seed, epoch, view in ((0, 0, 0), (2**40 + 7, 3, 1), (5, 999, -2)):
        here_keys, there_keys = keys(seed, epoch, index, view), keys(seed, epoch, there, view)
        for draw in (integers, uniforms):
            same &= torch.equal(draw(here_keys, 40), draw(there_keys, 40).cpu())
    found["keys, integers and uniforms bit-equal"] = same
    augmentation = build(node("augment", "simclr"))
    boxes = [augmentation.crop_parameters(i, 32, 32, seed=0, epoch=0)[0].cpu() for i in (index, there)]
    found[f"crops that differ, of {len(index):,}"] = int((boxes[0] != boxes[1]).any(1).sum())

    some = index[:256]
    images = bench.small.train.load(some.to(bench.device) % len(bench.small.train))
    look: dict[str, Any] = {"seed": 0, "epoch": 0, "size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    with settings(tf32=False):
        views = [augmentation(i.to(d), some.to(d), **look)[0] for i, d in ((images, "cpu"), (images, bench.device))]
    found["largest difference of a view (standard deviations)"] = float((views[0] - views[1].cpu()).abs().max())
    key = keys(0, 0, some, -2)
    for name in ("patch", "texture", "phase"):
        make = build(node("negatives", name))
        a, b = make(views[0], key), make(views[0].to(bench.device), key.to(bench.device)).cpu()
        found[f"{name}: pixels that differ by more than 1e-4"] = f"{float(((a - b).abs() > 1e-4).double().mean()):.2%}"
        if name == "patch":
            same &= torch.equal(a, b)
    return {
        "name": "random numbers and views",
        "passed": same and not found[f"crops that differ, of {len(index):,}"],
        **found,
    }


def gradients(bench: Bench, name: str, device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """Return the loss, the gradient of theta and the meta gradient of phi of one step with MSR and patch negatives."""
    cpu = torch.device("cpu")
    dataset = bench.images(bench.scale.compared, 32, cpu)
    method = bench.method(name, "tiny").to(device, dtype).train()
    # gamma = 0 leaves only the meta gradient. The gradient of uniformity would hide it.
    regularizer = bench.regularizer(method, mode="exact", every=1, gamma=0.0).to(device, dtype)
    views = bench.data(dataset, bench.scale.compared, "patch").views(Batch(0, torch.arange(bench.scale.compared)))
    assert views.negatives is not None

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    negatives = replace(views.negatives, rows=moved(views.negatives.rows))
    index, labels = views.index.to(device), views.labels.to(device)
    views = Views(moved(views.images), [moved(view) for view in views.views], index, labels, negatives)
    step = Step(0, 100, noise=5)
    targets = method.targets(views)
    torch.manual_seed(step.noise)
    output = method(views, targets, step)
    loss = output.loss + regularizer(views, output, step)
    torch.autograd.backward(loss)
    phi: list[Tensor] = []
    assert regularizer.optimizer is not None
    regularizer.optimizer.register_step_pre_hook(
        lambda *_: phi.extend(p.grad.clone() for p in regularizer.phi.values() if p.grad is not None)
    )
    regularizer.before_step(Pass(method, views, targets, step, RATE, None, output))
    return [[loss.detach()], list(ordinary_gradient(method).values()), phi]


def against_cpu(bench: Bench, name: str) -> Result:
    """Return errors of float32 on the device and on the CPU, both against float64 on the CPU."""
    cpu = torch.device("cpu")
    refused = {"regularizer", "negatives"} & bench.method(name, "tiny").refuses.keys()
    if refused:
        return {"name": name, "passed": None, "note": f"takes no {' and no '.join(sorted(refused))}"}
    with settings(tf32=False):
        exact, here, there = (
            gradients(bench, name, *where)
            for where in ((cpu, torch.float64), (cpu, torch.float32), (bench.device, torch.float32))
        )
    found: Result = {"name": name, "passed": True}
    for what, reference, on_cpu, on_device in zip(("loss", "theta", "phi"), exact, here, there, strict=True):
        errors = relative(on_device, reference), relative(on_cpu, reference)
        # If float32 on the CPU is far from float64 too, the step is ill-conditioned, and the same error is acceptable.
        found["passed"] = found["passed"] and errors[0] < max(1e-3, min(10 * errors[1], 0.1))
        found[f"{what}: device"], found[f"{what}: CPU"] = (f"{error:.1e}" for error in errors)
    return found


def no_wait(bench: Bench, name: str, negatives: str = "patch") -> Result:
    """Run a whole step in which the host never waits for the GPU."""
    found: Result = {"name": f"{name} + MSR + {negatives}", "passed": None}
    if {"regularizer", "negatives"} & bench.method(name, "tiny").refuses.keys():
        return {**found, "note": "takes neither"}
    training = bench.training(name, bench.scale.batches[0], msr={"every": 1}, negatives=negatives)
    for _ in range(2):
        training.step()
    if not bench.gpu:
        return {**found, "note": "no GPU here"}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            training.step()
        found["passed"] = True
    except RuntimeError as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "icl_msr" in f.filename]
        where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {ours[-1].line}" if ours else ""
        found |= {"passed": False, "note": f"{str(error).splitlines()[0]}{where}"}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return found


def resume(bench: Bench, name: str) -> Result:
    """Compare two steps, a checkpoint and two more steps in new objects with four steps, and four steps with four."""

    def fresh() -> Training:
        return bench.training(name, bench.scale.batches[0], msr={"every": 1}, negatives="patch")

    with settings(tf32=True, deterministic=True), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ends, file = [], io.BytesIO()
        for run in range(2):
            training = fresh()
            for step in range(4):
                training.step()
                if run == 0 and step == 1:
                    torch.save(training.state(), file)
            ends.append(training.state())
        file.seek(0)
        training = fresh()
        for parameter in training.method.parameters():  # so that state that is not loaded is noticed
            parameter.data.add_(1)
        training.load(torch.load(file, map_location=bench.device, weights_only=True))
        for _ in range(2):
            training.step()
    again, resumed = equal(*ends), equal(ends[0], training.state())
    note = {str(w.message).split(" does not have")[0] for w in warned if "deterministic" in str(w.message)}
    found = {"name": f"{name} + MSR + patch", "passed": resumed, "four steps twice: equal": again}
    return {**found, **({"note": "; ".join(sorted(note))} if note else {})}


class Save(Checkpoint):
    """Writes a checkpoint after some steps."""

    def __init__(self, path: Path, after: int) -> None:
        super().__init__()
        self.path, self.after = path, after

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after and not self.path.exists():
            trainer.save_checkpoint(self.path)


def trainer(bench: Bench, callbacks: list[Any], **changes: Any) -> pl.Trainer:
    """Build Lightning's Trainer as in a run, without a logger."""
    return pl.Trainer(
        accelerator="gpu" if bench.gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if bench.gpu else "32-true",
        log_every_n_steps=10,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **changes,
    )


def module(bench: Bench, name: str, batch: int, msr: dict[str, Any] | None) -> Pretraining:
    """Build the module that Lightning trains."""
    method = bench.method(name, bench.scale.backbone)
    regularizer = None if msr is None else bench.regularizer(method, **msr)
    optimizer = partial(torch.optim.Adam, lr=3e-3, weight_decay=1e-6)
    optimization = Optimization(optimizer, partial(cosine, warmup_steps=100, warmup_epochs=0.0, scale_lr="none"))
    built = Pretraining(method, regularizer, optimization, seed=0, batch_size=batch)
    built.to(memory_format=torch.channels_last)
    return built


def resume_in_lightning(bench: Bench, name: str) -> Result:
    """Compare four batches in the program's own loop with the last two of them from a checkpoint."""
    batch, ends = bench.scale.batches[0], []
    with settings(tf32=True, deterministic=True), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / "two.ckpt"
        for start in (None, path):
            built, data = module(bench, name, batch, {"every": 1}), bench.data(bench.small, batch, "patch")
            fit = trainer(bench, [Save(path, 2)], max_epochs=1, limit_train_batches=4)
            fit.fit(built, data, ckpt_path=start, weights_only=True)
            ends.append((built.state_dict(), fit.optimizers[0].state_dict()))
    same = all(equal(*parts) for parts in zip(*ends, strict=True))
    return {"name": f"{name} + MSR + patch, Lightning", "passed": same}


# ---------------------------------------------------------------------------------------------------------------- speed


def measure(bench: Bench, steps: dict[str, Step_]) -> dict[str, float]:
    """Return the median seconds of a step of each kind. Repetitions alternate."""
    count = {}
    for name, step in steps.items():
        for _ in range(bench.scale.cycle):  # warms up
            step()
        bench.wait()
        began = time.perf_counter()
        for _ in range(bench.scale.cycle):
            step()
        bench.wait()
        took = time.perf_counter() - began
        count[name] = bench.scale.cycle * max(1, min(bench.scale.cycles, round(bench.scale.seconds / took)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(bench.scale.repeats):
        for name, step in steps.items():
            bench.wait()
            began = time.perf_counter()
            for _ in range(count[name]):
                step()
            bench.wait()
            seconds[name].append((time.perf_counter() - began) / count[name])
    return {name: statistics.median(of) for name, of in seconds.items()}


def peak(bench: Bench, make: Callable[[], Training]) -> tuple[Training, float]:
    """Return a training after some steps, and its peak memory in gigabytes."""
    before = 0
    if bench.gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    training = make()
    for _ in range(bench.scale.cycle):
        training.step()
    bench.wait()
    return training, (torch.cuda.max_memory_allocated() - before) / 1e9 if bench.gpu else float("nan")


def speed_row(name: str, seconds: float, batch: int, **more: Any) -> Result:
    """Return the numbers of a speed row."""
    return {
        "name": name,
        "ms a step": round(1e3 * seconds, 3),
        "images/s": round(batch / seconds),
        "s an epoch": round(seconds / batch * EPOCH, 3),
        **more,
    }


def plain(bench: Bench, method: str, batch: int) -> Result:
    """Measure the plain step and the time of its stages."""
    bench.plain.pop((method, batch), None)
    training, memory = peak(bench, lambda: bench.plain_training(method, batch))
    seconds = measure(bench, {"plain": training.step})["plain"]
    aim = {"aim": "<= 1.5 s an epoch", "met": seconds / batch * EPOCH <= 1.5} if method == "simclr" else {}
    return speed_row(
        f"{method}, batch {batch}", seconds, batch, **stages(bench, training), **{"peak GB": memory}, **aim
    )


def stages(bench: Bench, training: Training) -> Result:
    """Return milliseconds of each stage: on the device between two marks, or on the host if there is no GPU."""
    spent: dict[str, list[float]] = {}
    for _ in range(2 * bench.scale.cycle):
        marks: list[tuple[str, Any]] = []

        def mark(stage: str, marks: list[tuple[str, Any]] = marks) -> None:
            if bench.gpu:
                event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                event.record()
                marks.append((stage, event))
            else:
                marks.append((stage, time.perf_counter()))

        training.step(mark)
        bench.wait()
        for (stage, begun), (_, ended) in itertools.pairwise(marks):
            took = begun.elapsed_time(ended) if bench.gpu else 1e3 * (ended - begun)
            spent.setdefault(stage, []).append(took)
    return {"stages, ms": {stage: round(statistics.median(of), 2) for stage, of in spent.items()}}


def beside(
    bench: Bench, method: str, batch: int, name: str, aim: float | None = None, mark: str | None = None, **changes: Any
) -> Result:
    """Measure a step with an additional part against the plain step, alternately."""
    training, memory = peak(bench, lambda: bench.training(method, batch, **changes))
    seconds = measure(bench, {"plain": bench.plain_training(method, batch).step, "with": training.step})
    ratio = seconds["with"] / seconds["plain"]
    found = speed_row(f"{method}, batch {batch}, {name}", seconds["with"], batch, ratio=round(ratio, 3))
    found |= {"peak GB": memory}
    found |= stages(bench, training)
    if aim is not None:
        found |= {"aim": f"<= {aim:g} x", "met": ratio <= aim}
    return found


def making(bench: Bench, batch: int) -> Result:
    """Measure the views and negatives of a SimCLR step: the cost of a generator without embedding its pictures."""
    steps: dict[str, Step_] = {"step": bench.plain_training("simclr", batch).step}
    for name in ("none", "patch", "phase", "texture"):
        training = bench.training("simclr", batch, negatives=name, backbone="tiny")

        def views(training: Training = training) -> None:
            training.views()
            training.count += 1

        steps[name] = views
    seconds = measure(bench, steps)
    found: Result = {"name": f"views alone, batch {batch}", "ms a step": round(1e3 * seconds["none"], 3)}
    met = {}
    for name, aim in (("patch", 0.03), ("phase", 0.03), ("texture", 0.15)):
        share = (seconds[name] - seconds["none"]) / seconds["step"]
        found[f"{name}: share of a step"] = f"{share:.1%} (aim {aim:.0%})"
        met[name] = share <= aim
    return {**found, "images/s": round(batch / seconds["none"]), "met": all(met.values())}


def in_lightning(bench: Bench, name: str, batch: int, msr: dict[str, Any] | None) -> Result:
    """Measure whole epochs of the program's own loop: Lightning's Trainer, Adam, logging every tenth step."""
    times: list[float] = []

    class Clock(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            bench.wait()
            times.append(time.perf_counter())

        def on_train_epoch_end(self, *_: Any) -> None:
            bench.wait()
            times.append(time.perf_counter())

    built, data = module(bench, name, batch, msr), bench.data(bench.small, batch)
    fit = trainer(bench, [Clock()], max_epochs=3, enable_checkpointing=False)
    fit.fit(built, data)
    batches = len(bench.small.train) // batch
    seconds = statistics.median([end - start for start, end in zip(times[2::2], times[3::2], strict=True)]) / batches
    aim = {"aim": "<= 1.5 s an epoch", "met": seconds / batch * EPOCH <= 1.5} if msr is None else {}
    said = f"{name}{'' if msr is None else ' + MSR'}, batch {batch}, Lightning's Trainer"
    return speed_row(said, seconds, batch, **aim)


def profile(bench: Bench, method: str, batch: int) -> Result:
    """Return the milliseconds of kernels and CPU operators in a plain step, by their own time."""
    from torch.profiler import ProfilerActivity

    training, count = bench.plain_training(method, batch), bench.scale.repeats
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.gpu else [])]
    for _ in range(bench.scale.cycle):
        training.step()
    bench.wait()
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(count):
            training.step()
        bench.wait()
        wall = time.perf_counter() - began
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    on_cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    kernels = sorted(on_device, key=lambda e: -e.self_device_time_total)
    operators = sorted(on_cpu, key=lambda e: -e.self_cpu_time_total)
    busy = sum(e.self_device_time_total for e in on_device) / 1e3 / count
    lines = [f"{method}, batch {batch}: {1e3 * wall / count:.2f} ms a step under the profiler"]
    lines += [f"kernels {busy:.2f} ms a step, {sum(e.count for e in on_device) / count:.0f} of them", ""]
    for title, of, key in (
        ("kernel", kernels, "self_device_time_total"),
        ("CPU operator", operators, "self_cpu_time_total"),
    ):
        lines.append(f"{'ms a step':>10} {'calls':>6}  {title}")
        lines += [f"{getattr(e, key) / 1e3 / count:10.3f} {e.count / count:6.0f}  {e.key[:110]}" for e in of[:20]]
        lines.append("")
    return {
        "name": f"{method}, batch {batch}: profile",
        "ms a step": round(1e3 * wall / count, 3),
        "text": "\n".join(lines),
    }


def compiled(bench: Bench, method: str, batch: int, what: str) -> Result:
    """Measure torch.compile of the backbone, or of the augmentation too, with the time of compilation."""
    options: dict[str, Any] = {"backend": "eager"} if bench.dry else {"dynamic": False}
    training = bench.training(method, batch)
    for name, part in training.method.named_modules():
        if name in ("backbone", "momentum_encoder.backbone"):
            part.compile(**options)
    if what == "backbone and views":
        training.data.augmentation = torch.compile(training.data.augmentation, **options)  # type: ignore[assignment]
    began = time.perf_counter()
    training.step()
    bench.wait()
    start = time.perf_counter() - began
    seconds = measure(bench, {"plain": bench.plain_training(method, batch).step, "with": training.step})
    ratio = round(seconds["with"] / seconds["plain"], 3)
    said = f"{method}, batch {batch}, compiled {what}"
    return speed_row(said, seconds["with"], batch, ratio=ratio, note=f"first step {start:.1f} s")


def benchmarked(bench: Bench, method: str, batch: int) -> Result:
    """Measure cudnn.benchmark, which times the algorithms of each convolution once."""
    training = bench.training(method, batch)

    def step() -> None:
        torch.backends.cudnn.benchmark = True
        training.step()
        torch.backends.cudnn.benchmark = False

    with settings(tf32=True):
        seconds = measure(bench, {"plain": bench.plain_training(method, batch).step, "with": step})
    ratio = round(seconds["with"] / seconds["plain"], 3)
    return speed_row(f"{method}, batch {batch}, cudnn.benchmark", seconds["with"], batch, ratio=ratio)


def optimisers(bench: Bench) -> Result:
    """Measure a step of SGD and Adam over ResNet-18, foreach and fused."""
    parameters = [
        p for p in bench.method("simclr", bench.scale.backbone).to(bench.device).parameters() if p.requires_grad
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    steps: dict[str, Step_] = {}
    for kind in (torch.optim.SGD, torch.optim.Adam):
        for how in ("foreach", "fused"):
            more: dict[str, Any] = {how: True, "momentum": 0.9} if kind is torch.optim.SGD else {how: True}
            steps[f"{kind.__name__}, {how}"] = kind(parameters, 1e-6, **more).step
    return {"name": "optimiser alone, ms", **{name: round(1e3 * s, 3) for name, s in measure(bench, steps).items()}}


def ceilings(bench: Bench) -> Result:
    """Measure the device's limits: a copy and a product of bf16 matrices, of random numbers."""
    side, size = (8192, 2**30) if bench.gpu and not bench.dry else (64, 2**10)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(size, device=bench.device, dtype=torch.float32).normal_() for _ in range(2))
    seconds = measure(bench, {"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    found = {"TFLOP/s, bf16 product": round(2 * side**3 / seconds["product"] / 1e12, 1)}
    return {"name": "the device itself", **found, "TB/s, copy": round(8 * size / seconds["copy"] / 1e12, 3)}


def photographs(bench: Bench, method: str) -> Result:
    """Measure ResNet-50 at 224 px with two views of images that are on the device."""
    scale = bench.scale
    dataset = bench.images(scale.photos, scale.photo_size[0], bench.device, scale.photo_size[1])
    make = lambda: bench.training(method, scale.photo_batch, backbone=scale.photo_backbone, dataset=dataset)  # noqa: E731
    training, memory = peak(bench, make)
    seconds = measure(bench, {"step": training.step})["step"]
    found = speed_row(f"{method}, {scale.photo_backbone}, {scale.photo_size[1]} px", seconds, scale.photo_batch)
    del found["s an epoch"]
    aim = {"aim": ">= 1,500 images/s", "met": scale.photo_batch / seconds >= 1500}
    return {**found, **stages(bench, training), "peak GB": memory, **aim}


class LightlySimCLR(nn.Module):
    """SimCLR with our backbone and lightly's head and loss."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone, self.head = backbone, SimCLRProjectionHead(channels, 512, 64)
        self.criterion = NTXentLoss(temperature=0.2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the loss of two views."""
        loss: Tensor = self.criterion(self.head(self.backbone(first)), self.head(self.backbone(second)))
        return loss


class Pictures(torch.utils.data.Dataset[Any]):
    """PIL images transformed by lightly's transform."""

    def __init__(self, images: Tensor, transform: Callable[[Any], Any]) -> None:
        self.images, self.transform = images.permute(0, 2, 3, 1).cpu().numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        """Return two views of an image."""
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index]))


def lightly(bench: Bench, batch: int, own_pipeline: bool) -> Result:
    """Measure lightly's SimCLR with the same network, precision, layout and optimiser."""
    name = f"lightly, SimCLR, batch {batch}, {'its own pipeline' if own_pipeline else 'our views, its step'}"
    try:
        from lightly.transforms.simclr_transform import SimCLRTransform
    except ImportError as error:
        return {"name": name, "note": f"not measured: {error}"}
    torch.manual_seed(0)
    encoder = build(node("backbone", bench.scale.backbone), image_size=32)
    model = LightlySimCLR(encoder, encoder.channels).to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)

    def learn(first: Tensor, second: Tensor) -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.gpu):
            loss = model(first, second)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ours = bench.plain_training("simclr", batch)
    if not own_pipeline:

        def step() -> None:
            views = ours.views()
            ours.count += 1
            learn(*views.views)

        seconds = measure(bench, {"plain": ours.step, "with": step})
        ratio = seconds["with"] / seconds["plain"]
        return speed_row(name, seconds["with"], batch, ratio=round(ratio, 3), met=ratio >= 1, aim=">= 1.0 x ours")
    assert isinstance(bench.small.train, ArraySplit)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    workers = bench.scale.workers
    loader = torch.utils.data.DataLoader(
        Pictures(bench.small.train.images, transform),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=bench.gpu,
    )
    began, done, waited = 0.0, 0, 2 if bench.dry else 5
    for number, views in enumerate(loader):
        if number == waited:  # the workers have started
            bench.wait()
            began = time.perf_counter()
        layout = {"non_blocking": True, "memory_format": torch.channels_last}
        learn(*(view.to(bench.device, **layout) for view in views[:2]))
        done = number - waited + 1
        if done >= 4 and time.perf_counter() - began > 20 * bench.scale.seconds:
            break
    bench.wait()
    seconds_ = (time.perf_counter() - began) / max(done, 1)
    ratio = seconds_ / measure(bench, {"plain": ours.step})["plain"]
    return speed_row(name, seconds_, batch, ratio=round(ratio, 2), note=f"{workers} workers")


def agreement(bench: Bench, method: str, batch: int) -> Result:
    """Return cosines of each mode's meta gradient, as in a bf16 run, to the exact one in float64."""
    training = bench.training(method, batch, msr={"every": 1})
    for _ in range(5 * bench.scale.cycle):
        training.step()
    views, step = training.views(), Step(0, 100, noise=1)

    def signal(mode: str, dtype: torch.dtype, mixed: bool, tf32: bool) -> Tensor:
        built = bench.method(method, bench.scale.backbone).to(bench.device).train()
        built.load_state_dict(training.method.state_dict())
        built.to(dtype)
        regularizer = bench.regularizer(built, mode=mode, every=1, gamma=0.0).to(bench.device, dtype)
        of = Views(views.images.to(dtype), [v.to(dtype) for v in views.views], views.index, views.labels)
        with settings(tf32=tf32), torch.autocast(bench.device.type, torch.bfloat16, enabled=mixed):
            targets = built.targets(of)
            torch.manual_seed(step.noise)
            output = built(of, targets, step)
            loss = output.loss + regularizer(of, output, step)
        with settings(tf32=tf32):
            loss.backward()
            phi: list[Tensor] = []
            assert regularizer.optimizer is not None
            hook = lambda *_: phi.extend(p.grad.flatten() for p in regularizer.phi.values() if p.grad is not None)  # noqa: E731
            regularizer.optimizer.register_step_pre_hook(hook)
            precision = torch.bfloat16 if mixed else None
            regularizer.before_step(Pass(built, of, targets, step, RATE, precision, output))
        return torch.cat(phi).double()

    exact = signal("exact", torch.float64, False, False)
    found: Result = {"name": f"{method}, batch {batch}: cosine and norm ratio to exact in float64"}
    variants = {"exact, fp32": ("exact", False, False), "difference, fp32": ("difference", False, False)}
    variants |= {f"{mode}, bf16 and TF32": (mode, bench.gpu, True) for mode in ("exact", "difference", "near_free")}
    for name, (mode, mixed, tf32) in variants.items():
        other = signal(mode, torch.float32, mixed, tf32)
        cosine = nn.functional.cosine_similarity(other, exact, dim=0)
        found[name] = f"{float(cosine):.5f}, {float(other.norm() / exact.norm()):.3f}"
    return found


# --------------------------------------------------------------------------------------------------------------- report


@dataclass
class Row:
    """One measurement, and its approximate time on a GPU."""

    group: str
    name: str
    seconds: float
    measure: Callable[[Bench], Result]


def rows(scale: Scale) -> list[Row]:
    """Return all measurements, the most important first."""
    one, two = scale.batches
    others = [name for name in scale.methods if name not in FIRST]
    every = {"every": 1}
    modes: list[tuple[str, dict[str, Any]]] = [
        (f"MSR {mode}, every={k}", {"mode": mode, "every": k})
        for mode, k in (
            ("near_free", 4),
            ("exact", 4),
            ("difference", 1),
            ("near_free", 1),
            ("exact", 1),
            ("double_backward", 4),
        )
    ]
    right, fast = "Correctness", "Speed"
    listed = [Row(right, "random numbers and views", 10, draws)]
    listed += [Row(right, f"no wait, {name}", 6, partial(no_wait, name=name)) for name in FIRST]
    listed += [Row(right, f"against the CPU, {name}", 6, partial(against_cpu, name=name)) for name in FIRST]
    listed += [Row(right, f"resume, {name}", 6, partial(resume, name=name)) for name in ("simclr", "moco")]
    listed += [
        Row("Ceilings", "ceilings", 3, ceilings),
        Row(fast, "simclr plain", 5, lambda b: plain(b, "simclr", one)),
        Row("Profile", "profile simclr", 8, lambda b: profile(b, "simclr", one)),
        Row(fast, "simclr MSR", 10, lambda b: beside(b, "simclr", one, "MSR default", 1.4, msr={})),
        Row(fast, "simclr patch", 8, lambda b: beside(b, "simclr", one, "patch", negatives="patch")),
        Row(fast, "simclr texture", 10, lambda b: beside(b, "simclr", one, "texture", negatives="texture")),
        Row(fast, "simclr phase", 8, lambda b: beside(b, "simclr", one, "phase", negatives="phase")),
        Row("Making", "making", 10, lambda b: making(b, one)),
        Row(fast, "simclr Lightning", 12, lambda b: in_lightning(b, "simclr", one, None)),
        Row(fast, "moco plain", 5, lambda b: plain(b, "moco", one)),
        Row(fast, "moco MSR", 10, lambda b: beside(b, "moco", one, "MSR default", 1.4, msr={})),
        Row(fast, "moco patch", 8, lambda b: beside(b, "moco", one, "patch", negatives="patch")),
        Row(fast, "simclr plain, large", 6, lambda b: plain(b, "simclr", two)),
        Row(fast, "simclr MSR, large", 12, lambda b: beside(b, "simclr", two, "MSR default", 1.4, msr={})),
        Row(fast, "cudnn.benchmark", 8, lambda b: benchmarked(b, "simclr", one)),
        Row(fast, "simclr compiled", 60, lambda b: compiled(b, "simclr", one, "backbone")),
        Row(fast, "photographs", 20, lambda b: photographs(b, "simclr")),
        Row("Optimisers", "optimisers", 4, optimisers),
        Row(fast, "lightly, our views", 8, lambda b: lightly(b, one, False)),
        Row(fast, "lightly, its own", 30, lambda b: lightly(b, one, True)),
    ]
    listed += [
        Row(fast, f"simclr {name}", 12, partial(beside, method="simclr", batch=one, name=name, msr=keys))
        for name, keys in modes
    ]
    listed += [Row("Agreement", "agreement", 20, lambda b: agreement(b, "simclr", min(one, 128)))]
    listed += [Row(right, f"against the CPU, {name}", 5, partial(against_cpu, name=name)) for name in others]
    listed += [Row(right, f"no wait, {name}", 4, partial(no_wait, name=name)) for name in others]
    listed += [
        Row(right, f"no wait, {kind}", 5, partial(no_wait, name="simclr", negatives=kind))
        for kind in ("texture", "phase")
    ]
    listed += [
        Row(right, "resume in Lightning", 10, lambda b: resume_in_lightning(b, "moco")),
        Row(fast, "simclr MSR Lightning", 15, lambda b: in_lightning(b, "simclr", one, {})),
        Row(fast, "moco texture", 10, lambda b: beside(b, "moco", one, "texture", negatives="texture")),
        Row(fast, "moco phase", 8, lambda b: beside(b, "moco", one, "phase", negatives="phase")),
        Row(fast, "moco plain, large", 6, lambda b: plain(b, "moco", two)),
        Row(fast, "moco MSR, large", 12, lambda b: beside(b, "moco", two, "MSR default", 1.4, msr={})),
        Row(fast, "simclr compiled, views", 80, lambda b: compiled(b, "simclr", one, "backbone and views")),
        Row("Profile", "profile moco", 8, lambda b: profile(b, "moco", one)),
        Row(fast, "simclr patch, large", 8, lambda b: beside(b, "simclr", two, "patch", negatives="patch")),
        Row(fast, "simclr texture, large", 10, lambda b: beside(b, "simclr", two, "texture", negatives="texture")),
        Row(fast, "simclr phase, large", 8, lambda b: beside(b, "simclr", two, "phase", negatives="phase")),
        Row(
            fast,
            "simclr both, large",
            10,
            lambda b: beside(b, "simclr", two, "MSR, patch", msr=every, negatives="patch"),
        ),
        Row(fast, "moco compiled", 60, lambda b: compiled(b, "moco", one, "backbone")),
        Row(fast, "simclr compiled, large", 60, lambda b: compiled(b, "simclr", two, "backbone")),
    ]
    return listed


class OutOfTimeError(Exception):
    """Raised if the budget is spent in the middle of a row."""


class Report:
    """Results so far, written to disk after every row."""

    def __init__(self, folder: Path, machine: Result) -> None:
        self.folder, self.machine = folder, machine
        self.found: list[Result] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row, result: Result, took: float) -> None:
        """Add a row and write both files again."""
        self.found.append({"group": row.group, "row": row.name, **result, "took": round(took, 1)})
        document = {"machine": self.machine, "rows": self.found}
        self._write("gpu.json", json.dumps(document, indent=1, default=str))
        self._write("gpu.md", self.markdown())
        shown = {key: value for key, value in result.items() if key != "text"}
        print(f"[{took:5.1f} s] {row.group}: {row.name}: {json.dumps(shown, default=str)}", flush=True)

    def _write(self, name: str, text: str) -> None:
        beside_ = self.folder / f"{name}.new"
        beside_.write_text(text)
        beside_.replace(self.folder / name)

    def markdown(self) -> str:
        """Return one table per group."""
        lines = ["# The package on a GPU", "", *(f"- {key}: {value}" for key, value in self.machine.items())]
        for group in dict.fromkeys(row["group"] for row in self.found):
            of = [row for row in self.found if row["group"] == group]
            hidden = {"group", "row", "text", "took"}
            columns = list(dict.fromkeys(key for row in of for key in row if key not in hidden))
            lines += ["", f"## {group}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in of]
            lines += [f"\n```\n{row['text']}```" for row in of if "text" in row]
        return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def machine(device: torch.device, dry: bool) -> Result:
    """Return a description of the machine and the libraries."""
    found: Result = {"device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"}
    if device.type == "cuda":
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    found |= {
        "torch": torch.__version__,
        "Lightning": version("pytorch-lightning"),
        "Python": platform.python_version(),
    }
    if dry:
        found["note"] = "a dry run: the figures say nothing"
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run all rows for which there is time. Return 1 if a row failed, else 0."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds, from the start of this process")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of rows, or patterns as of files")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU as well")
    options = parser.parse_args(words)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here; add --dry-run to try the program on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, DRY if options.dry_run else REAL, options.dry_run)
    report = Report(options.out, machine(device, options.dry_run))
    chosen = [r for r in rows(bench.scale) if any(fnmatch(r.name, pattern) for pattern in options.only)]

    def out_of_time(*_: Any) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, out_of_time)
    failed = False
    for row in chosen:
        left = options.budget - (time.monotonic() - began)
        start = time.monotonic()
        if left < (0.0 if options.dry_run and options.budget else row.seconds):
            result: Result = {"name": row.name, "note": "not measured: no time left"}
        else:
            try:
                signal.setitimer(signal.ITIMER_REAL, left)
                result = row.measure(bench)
            except OutOfTimeError:
                result = {"name": row.name, "note": "not measured: cut off by the budget"}
            except Exception as error:
                traceback.print_exc()
                result = {"name": row.name, "passed": False, "note": f"{type(error).__name__}: {error}"[:300]}
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        failed |= result.get("passed") is False
        report.add(row, result, time.monotonic() - start)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
