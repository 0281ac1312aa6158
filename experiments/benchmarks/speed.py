"""Measure the speed of the hot paths, as images per second and ratios: medians of alternating rounds in one run.

python experiments/benchmarks/speed.py [--images 256] [--size 32] [--rounds 9] [--seconds 60] [--tiny]

* a step of the default backbone (SimCLR, batch 256, 32 px): forward, backward and optimiser; the same step with the
  meta semantic regularizer, without and with its meta step;
* two-view augmentation in a batch against torchvision v2 image by image, both in this process;
* patch negatives against a loop over images.

Each of the three parts takes about `--seconds` at most.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import v2

from experiments.benchmarks.negatives import patch_loop
from experiments.benchmarks.timing import Work, alternate
from icl_msr.core.config import Settings, build, check, config_dir
from icl_msr.core.randomness import keys
from icl_msr.core.views import Views
from icl_msr.methods import Method, Step
from icl_msr.negatives import PatchNegatives
from icl_msr.regularizers import MetaSemanticRegularizer, ordinary_gradient
from icl_msr.training.hardware import Plan

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass
class Bench:
    """A batch of images of one size, and the components of a run."""

    images: int
    size: int
    settings: Settings
    plan: Plan

    @property
    def index(self) -> Tensor:
        """Numbers of the images, (N,)."""
        return torch.arange(self.images, device=self.plan.device)


def steps(bench: Bench) -> Work:
    """Return a plain step, and steps with MSR without and with its meta step."""
    plan, layout = bench.plan, torch.channels_last if bench.plan.channels_last else torch.contiguous_format
    backbone = build(bench.settings.backbone, image_size=bench.size)
    method: Method = build(bench.settings.method, backbone=backbone, classes=10, mean=MEAN, std=STD)
    regularizer: MetaSemanticRegularizer = build(
        bench.settings.regularizer, channels=method.channels, method_temperature=method.temperature
    )
    method.to(plan.device, memory_format=layout)  # type: ignore[call-overload]
    regularizer.to(plan.device)
    images = [torch.randn(bench.images, 3, bench.size, bench.size, device=plan.device) for _ in range(3)]
    images = [image.contiguous(memory_format=layout) for image in images]
    views, now = Views(images[0], images[1:], bench.index, bench.index), Step(0, 1)
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)

    def step(*, penalty: bool, meta: bool) -> None:
        with torch.autocast(plan.device.type, torch.bfloat16, enabled="bf16" in plan.precision):
            targets = method.targets(views)
            output = method(views, targets, now)
            loss = output.loss + (regularizer(views, output, now) if penalty else 0)
        optimizer.zero_grad()
        loss.backward()
        if meta:
            regularizer.meta_step(method, views, targets, now, ordinary_gradient(method), 1e-3)
        optimizer.step()

    return {
        "SimCLR step, tiny": lambda: step(penalty=False, meta=False),
        "  with L_msr": lambda: step(penalty=True, meta=False),
        "  with L_msr and the meta step": lambda: step(penalty=True, meta=True),
    }


def augmentation(bench: Bench) -> Work:
    """Return work that turns uint8 images into two normalised float views."""
    shape = (bench.images, 3, bench.size, bench.size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=bench.plan.device)
    ours = build(bench.settings.augment)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(bench.size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return {
        "two views, batched": lambda: ours(images, bench.index, seed=0, epoch=0, size=bench.size, mean=MEAN, std=STD),
        "two views, torchvision v2 image by image": lambda: [
            torch.stack([theirs(image) for image in images]) for _ in range(2)
        ],
    }


def negatives(bench: Bench) -> Work:
    """Return work that makes one patch negative per image."""
    query = torch.randn(bench.images, 3, bench.size, bench.size, device=bench.plan.device)
    patch: PatchNegatives = build(bench.settings.negatives)
    return {
        "patch negatives, batched": lambda: patch(query, keys(0, 0, bench.index, -2)),
        "patch negatives, a loop over images": lambda: patch_loop(query, patch),
    }


PARTS: tuple[Callable[[Bench], Work], ...] = (steps, augmentation, negatives)


def main(words: Sequence[str] | None = None) -> None:
    """Measure the parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tiny", action="store_true", help="one round of 8 images, to see that it runs")
    options = parser.parse_args(words)
    if options.tiny:
        options.images, options.rounds = 8, 1
    chosen = ["method=simclr", "regularizer=msr", "negatives=patch", "augment=small", "backbone=tiny"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = check(compose("config", overrides=chosen))
    plan: Plan = build(settings.hardware).plan()
    bench = Bench(options.images, options.size, settings, plan)
    table = Table(title=f"batch {bench.images}, {bench.size} px, on {plan}")
    table.add_column("what")
    table.add_column("images/s", justify="right")
    table.add_column("ratio to the first", justify="right")
    for part in PARTS:
        seconds = alternate(part(bench), rounds=options.rounds, limit=options.seconds, device=plan.device)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        first = next(iter(medians.values()))
        for name, median in medians.items():
            table.add_row(name, f"{bench.images / median:,.0f}", f"{first / median:.2f}")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
