"""Speed of the hot paths: medians of alternating rounds in one run, as images a second and ratios.

python experiments/benchmarks/speed.py

* a step of the default backbone (SimCLR, batch 256, 32 px), forward, backward and optimiser;
* two-view augmentation in a batch against torchvision v2 image by image, both in this process;
* patch negatives against the loop over images that their description suggests;
* a step with the meta semantic regularizer against a plain one.
"""

import statistics
import time
from collections.abc import Callable

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms import v2

from icl_msr.core.config import build, config_dir
from icl_msr.core.randomness import keys
from icl_msr.core.views import Views
from icl_msr.methods import SimCLR, Step
from icl_msr.negatives import PatchNegatives
from icl_msr.regularizers.bilevel import trainable
from icl_msr.training.hardware import Hardware

N, SIZE, ROUNDS = 256, 32, 9
PLAN = Hardware(accelerator="auto", devices=1, precision="auto", channels_last=True).plan()


def node(path: str, **changes: object) -> dict[str, object]:
    """The values of one YAML file."""
    loaded = OmegaConf.load(config_dir() / f"{path}.yaml")
    return {**OmegaConf.to_container(loaded), **changes}  # type: ignore[dict-item]


def measure(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Images a second of each piece of work, the rounds alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(ROUNDS + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if PLAN.accelerator == "gpu":
                torch.cuda.synchronize()
            if round_:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: N / statistics.median(values) for name, values in seconds.items()}


def step_and_regularizer() -> dict[str, float]:
    """A plain step, and steps with MSR: every step without its meta step, and with it."""
    backbone = build(node("backbone/tiny"), SIZE)
    method: SimCLR = build(node("method/simclr"), backbone)
    regularizer = build(node("regularizer/msr", seed=0, every=1), backbone.channels, method.temperature)
    method.to(PLAN.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    regularizer.to(PLAN.device)
    images = [torch.randn(N, 3, SIZE, SIZE, device=PLAN.device) for _ in range(3)]
    images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    index = torch.arange(N, device=PLAN.device)
    views = Views(images[0], images[1:], index, index)
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)

    def step(penalty: bool, meta: bool) -> None:
        with torch.autocast(PLAN.device.type, torch.bfloat16, enabled="bf16" in PLAN.precision):
            targets = method.targets(views)
            output = method(views, targets, Step(0, 1))
            loss = output.loss + (regularizer(views, output, Step(0, 1)) if penalty else 0)
        optimizer.zero_grad()
        loss.backward()
        if meta:
            inner = {name: p.grad for name, p in trainable(method).items() if p.grad is not None}
            regularizer.meta_step(method, views, targets, Step(0, 1), inner, 1e-3)
        optimizer.step()

    return measure(
        {
            "SimCLR step, tiny": lambda: step(False, False),
            "  with L_msr": lambda: step(True, False),
            "  with L_msr and the meta step": lambda: step(True, True),
        }
    )


def augmentation() -> dict[str, float]:
    """Both views of a batch of bytes to normalised floats."""
    images = torch.randint(256, (N, 3, SIZE, SIZE), dtype=torch.uint8, device=PLAN.device)
    index = torch.arange(N, device=PLAN.device)
    ours = build(node("augment/small"))
    look = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*look.values()),
        ]
    )

    def one_by_one() -> list[Tensor]:
        return [torch.stack([theirs(image) for image in images]) for _ in range(2)]

    return measure(
        {
            "two views, batched": lambda: ours(images, index, seed=0, epoch=0, size=SIZE, **look),
            "two views, torchvision v2 image by image": one_by_one,
        }
    )


def negatives() -> dict[str, float]:
    """One patch negative an image."""
    query = torch.randn(N, 3, SIZE, SIZE, device=PLAN.device)
    index = torch.arange(N, device=PLAN.device)
    patch: PatchNegatives = build(node("negatives/patch"))

    def loop() -> Tensor:
        canvases = []
        for image in query:
            d = int(torch.randint(2, 11, ()))
            tiles = SIZE // d + 1
            rows = []
            for _ in range(tiles):
                corners = torch.randint(0, SIZE - d, (tiles, 2)).tolist()
                rows.append(torch.cat([image[:, y : y + d, x : x + d] for y, x in corners], dim=2))
            canvases.append(torch.cat(rows, dim=1)[:, :SIZE, :SIZE])
        return torch.stack(canvases)

    return measure(
        {
            "patch negatives, batched": lambda: patch(query, keys(0, 0, index, -2)),
            "patch negatives, a loop over images": loop,
        }
    )


def main() -> None:
    """Measures and prints."""
    table = Table(title=f"batch {N}, {SIZE} px, on {PLAN}")
    table.add_column("what")
    table.add_column("images/s", justify="right")
    table.add_column("ratio to the first", justify="right")
    for part in (step_and_regularizer, augmentation, negatives):
        rates = part()
        first = next(iter(rates.values()))
        for name, rate in rates.items():
            table.add_row(name, f"{rate:,.0f}", f"{rate / first:.2f}")
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
