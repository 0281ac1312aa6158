"""Measure the share of a MoCo step that non-semantic negatives take: generating them, and the extra forward pass.

python experiments/negatives/share.py [BACKBONE=tiny] [SIZE=32] [BATCH=256] [--rounds 5] [--tiny]

Everything a step of `python -m icl_msr.run method=moco` does with a batch of embedded images: augmentation, targets,
loss, backward and optimiser; steps without and with each kind of negatives alternate in one run.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.timing import stopwatch
from icl_msr.cli.assemble import assemble
from icl_msr.core.config import check, config_dir
from icl_msr.core.views import Views
from icl_msr.methods import Step
from icl_msr.training.datamodule import Batch
from icl_msr.training.hardware import Hardware

KINDS = ("none", "patch", "phase", "texture")
FEW = ("dataset.train=16", "dataset.test=16", "dataset.balanced=16", "dataset.cache=null", "method.queue_size=16")


class Stepper:
    """The step of a run, divided into two parts."""

    def __init__(self, kind: str, backbone: str, size: int, batch: int, *more: str):
        words = ["method=moco", "regularizer=none", f"negatives={kind}", f"backbone={backbone}"]
        words += ["dataset=confounded", f"dataset.image_size={size}", f"loader.batch_size={batch}", *more]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            settings = check(compose("config", overrides=words))
        self.plan = Hardware(**{key: v for key, v in settings.hardware.items() if key != "_target_"}).plan()
        pieces = assemble(settings, self.plan)
        self.data, self.method = pieces.data, pieces.module.method.to(self.plan.device)
        if self.plan.channels_last:
            self.method.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.method.parameters(), 1e-4)
        self.batch = Batch(0, torch.arange(batch, device=self.plan.device))
        self.views: Views

    def make(self) -> None:
        """Augment the batch and make its negatives."""
        self.views = self.data.views(self.batch)

    def train(self) -> None:
        """Run forward, backward and the optimiser."""
        with torch.autocast(self.plan.device.type, torch.bfloat16, enabled="bf16" in self.plan.precision):
            loss = self.method(self.views, self.method.targets(self.views), Step(0, 1)).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def main(words: Sequence[str] | None = None) -> None:
    """Measure all kinds and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", nargs="?", default="tiny")
    parser.add_argument("size", type=int, nargs="?", default=32)
    parser.add_argument("batch", type=int, nargs="?", default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="one round of 8 images, to see that it runs")
    options = parser.parse_args(words)
    if options.tiny:
        options.batch, options.rounds = 8, 1
    few = FEW if options.tiny else ()
    steppers = {kind: Stepper(kind, options.backbone, options.size, options.batch, *few) for kind in KINDS}
    plan = steppers["none"].plan
    made: dict[str, list[float]] = {kind: [] for kind in KINDS}
    trained: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for round_ in range(options.rounds + 1):
        for kind, stepper in steppers.items():
            making, training = (stopwatch(call, plan.device) for call in (stepper.make, stepper.train))
            if round_:  # the first step warms up
                made[kind].append(making)
                trained[kind].append(training)
    views, steps = ({kind: statistics.median(part[kind]) for kind in KINDS} for part in (made, trained))
    whole = views["none"] + steps["none"]
    table = Table(
        title=f"MoCo, {options.backbone}, {options.size} px, batch {options.batch}, {plan}: % of a plain step"
    )
    for column in ("negatives", "a step, s", "making them", "extra forward", "together"):
        table.add_column(column, justify="left" if column == "negatives" else "right")
    for kind in KINDS:
        extra = [views[kind] - views["none"], steps[kind] - steps["none"]]
        shares = [f"{100 * share / whole:.1f}" for share in (*extra, sum(extra))]
        table.add_row(kind, f"{views[kind] + steps[kind]:.3f}", *(shares if kind != "none" else ["–"] * 3))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
