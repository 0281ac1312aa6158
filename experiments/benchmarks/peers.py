"""Compare the speed with that of other libraries: medians of alternating rounds in one run.

python -m experiments.benchmarks.peers [GROUP ...] [--rounds 5] [--seconds 60] [--to FOLDER] [--tiny]

The groups are:

* views: two augmented views of images in memory at 32, 96 and 224 px, by torchvision v1 (PIL) and v2, lightly,
  albumentations and kornia. They use two workers or two threads, as ours does;
* losses: forward and backward pass of the losses that lightly has too, and the memory of NT-Xent;
* steps: a training step of SimCLR, MoCo and BYOL on the same backbone, in fp32, by lightly's parts in the order of its
  examples, with each side's own memory format and with lightly's parts in ours;
* evaluation: features, kNN and a grid of linear probes; see `evaluation.py`.

`make bench` runs it in an environment of its own. A library that is not installed is left out. A ratio above 1 means
that ours is faster.
"""

import argparse
import copy
import importlib.util
import json
import logging
import platform
import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from experiments.benchmarks import evaluation
from experiments.benchmarks.timing import Work, alternate
from icl_msr.augment import Augmentation
from icl_msr.core.config import build, check, config_dir
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import decoupled, nt_xent
from icl_msr.losses.decorrelation import barlow_twins, vicreg
from icl_msr.methods import Method, Step

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
JITTER = (0.4, 0.4, 0.4, 0.1)
OURS = "ours"
TINY = 64
"""Fewer images than this are only to see that it runs."""


@dataclass
class Row:
    """One comparison: the work of each library, ours first."""

    name: str
    work: Work


# ---------------------------------------------------------------------------------------------- two views


class TwoViews(Dataset[Any]):
    """Images in memory with one transform that is called for each view."""

    def __init__(self, images: Sequence[Any], views: Callable[[Any], Any]):
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.views(self.images[i])


def through_workers(images: Sequence[Any], views: Callable[[Any], Any]) -> Callable[[], None]:
    """Return a call that goes once through the images with two workers, which are started before the first round."""
    loader = DataLoader(
        TwoViews(images, views), batch_size=32, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )

    def once() -> None:
        for _ in loader:
            pass

    return once


def views(images: int) -> Iterator[Row]:
    """Yield rows of two views at three sizes."""
    kinds = ((32, 32, 0.0), (96, 96, 0.5), (224, 400, 0.0), (224, 400, 0.5))
    for size, source, blur in kinds[: 1 if images < TINY else None]:
        count = max(8, images * 32 // size)
        noise = torch.rand(count, 3, source // 8, source // 8)
        smooth = nn.functional.interpolate(noise, size=(source, source), mode="bicubic").clamp(0, 1)
        pixels = (255 * smooth).to(torch.uint8)
        yield Row(f"two views of {count} images, {size} px from {source}, blur {blur:g}", _views(pixels, size, blur))


def _views(pixels: Tensor, size: int, blur: float) -> dict[str, Callable[[], object]]:
    index = torch.arange(len(pixels))
    recipe: dict[str, Any] = {"scale": [0.2, 1.0], "ratio": [3 / 4, 4 / 3], "interpolation": "bilinear", "flip": 0.5}
    recipe |= {"jitter": list(JITTER), "jitter_probability": 0.8, "gray": 0.2, "blur": blur, "sigma": [0.1, 2.0]}
    ours = Augmentation(**recipe, solarize=0.0, size=None, views=[{}, {}])
    work: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(pixels, index, seed=0, epoch=0, size=size, mean=MEAN, std=STD)
    }
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    kernel = size // 10 // 2 * 2 + 1

    def chain(kit: Any, *last: Any, **keys: Any) -> Any:
        parts = [kit.RandomResizedCrop(size, scale=(0.2, 1.0), **keys), kit.RandomHorizontalFlip()]
        parts += [kit.RandomApply([kit.ColorJitter(*JITTER)], p=0.8), kit.RandomGrayscale(0.2)]
        if blur:
            parts.append(kit.RandomApply([kit.GaussianBlur(kernel, (0.1, 2.0))], p=blur))
        return kit.Compose([*parts, *last, kit.Normalize(MEAN, STD)])

    first = chain(v1, v1.ToTensor())
    second = chain(v2, v2.ToDtype(torch.float32, scale=True), antialias=True)
    work["torchvision v1"] = through_workers(pictures, lambda x: (first(x), first(x)))
    work["torchvision v2"] = through_workers(list(pixels), lambda x: (second(x), second(x)))
    if _installed("lightly"):
        from lightly.transforms.simclr_transform import SimCLRTransform

        keys: dict[str, Any] = {"cj_strength": 0.5, "min_scale": 0.2, "gaussian_blur": blur, "sigmas": (0.1, 2.0)}
        theirs = SimCLRTransform(input_size=size, random_gray_scale=0.2, **keys)
        work["lightly"] = through_workers(pictures, theirs)
    if _installed("albumentations"):
        import albumentations as album
        from albumentations.pytorch import ToTensorV2

        parts = [album.RandomResizedCrop((size, size), scale=(0.2, 1.0)), album.HorizontalFlip(p=0.5)]
        parts += [album.ColorJitter(*JITTER, p=0.8), album.ToGray(p=0.2)]
        if blur:
            parts.append(album.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=blur))
        whole = album.Compose([*parts, album.Normalize(MEAN, STD), ToTensorV2()])
        arrays = [np.asarray(picture) for picture in pictures]
        work["albumentations"] = through_workers(arrays, lambda x: [whole(image=x)["image"] for _ in range(2)])
    if _installed("kornia"):
        import kornia.augmentation as kornia

        kinds = [kornia.RandomResizedCrop((size, size), scale=(0.2, 1.0)), kornia.RandomHorizontalFlip(p=0.5)]
        kinds += [kornia.ColorJitter(*JITTER, p=0.8), kornia.RandomGrayscale(p=0.2)]
        if blur:
            kinds.append(kornia.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=blur))
        batch = nn.Sequential(*kinds, kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
        work["kornia"] = lambda: [batch(part.float() / 255) for part in torch.split(pixels, 32) for _ in range(2)]
    return work


# ---------------------------------------------------------------------------------------------- losses


def losses(images: int) -> Iterator[Row]:
    """Yield rows of a forward and backward pass of each loss."""
    if not _installed("lightly"):
        return
    from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, VICRegLoss

    pairs: list[tuple[str, Callable[[Tensor, Tensor], Tensor], nn.Module]] = [
        ("NT-Xent", lambda a, b: nt_xent(a, b, 0.5, None), NTXentLoss(0.5)),
        ("DCL", lambda a, b: decoupled(a, b, 0.5, None, None), DCLLoss(0.5)),
        ("Barlow Twins", lambda a, b: barlow_twins(a, b, 0.005), BarlowTwinsLoss(0.005)),
        ("VICReg", lambda a, b: vicreg(a, b, 25.0, 25.0, 1.0), VICRegLoss()),
    ]
    for count in (2 * images,) if images < TINY else (2 * images, 8 * images, 16 * images):
        for name, ours, theirs in pairs:
            first, second = (torch.randn(count, 128, requires_grad=True) for _ in range(2))
            work = {
                OURS: lambda f=ours, a=first, b=second: f(a, b).backward(),
                "lightly": lambda f=theirs, a=first, b=second: f(a, b).backward(),
            }
            yield Row(f"{name}, {count} pairs", work)


def peak(which: str, count: int) -> float:
    """Return the megabytes that a forward and backward pass of NT-Xent adds, in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (which, count))


def _peak(which: str, count: int) -> float:
    from lightly.loss import NTXentLoss

    first, second = (torch.randn(count, 128, requires_grad=True) for _ in range(2))
    theirs = NTXentLoss(0.5)
    call = (lambda a, b: nt_xent(a, b, 0.5, None)) if which == OURS else theirs
    call(first[:64], second[:64]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(first, second).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# ---------------------------------------------------------------------------------------------- steps


def steps(images: int) -> Iterator[Row]:
    """Yield rows of a whole training step without a loader: forward and backward pass, optimiser, momentum, queue."""
    if not _installed("lightly"):
        return
    kinds = [(name, body) for body in ("tiny", "resnet18") for name in ("moco", "simclr", "byol")]
    for name, backbone in kinds[: 1 if images < TINY else None]:
        batch = images // 4 if backbone == "resnet18" else images
        pictures = [torch.randn(batch, 3, 32, 32) for _ in range(3)]
        yield Row(f"{name} step, {backbone}, batch {batch}, 32 px, fp32", _steps(name, backbone, pictures))


def _steps(name: str, backbone: str, pictures: list[Tensor]) -> dict[str, Callable[[], object]]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = check(compose("config", [f"method={name}", f"backbone={backbone}", "regularizer=none"]))
    body = build(settings.backbone, image_size=32)
    method: Method = build(settings.method, backbone=copy.deepcopy(body), classes=10, mean=MEAN, std=STD)
    method.to(memory_format=torch.channels_last)
    last = [picture.contiguous(memory_format=torch.channels_last) for picture in pictures]
    here = Views(last[0], last[1:], torch.arange(len(last[0])), torch.zeros(len(last[0]), dtype=torch.long))
    adam, now = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-3), Step(0, 10)

    def ours() -> None:
        targets = method.targets(here)
        output = method(here, targets, now)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        method.advance(now)
        method.observe(targets, [e.detach() for e in output.embeddings])

    return {
        OURS: ours,
        "lightly": _theirs(name, copy.deepcopy(body), pictures[1:]),
        "lightly, channels_last": _theirs(name, body.to(memory_format=torch.channels_last), last[1:]),
    }


def _theirs(name: str, body: Any, pictures: list[Tensor]) -> Callable[[], None]:
    """Return a step of lightly's parts, as its examples write it."""
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    heads = {"simclr": SimCLRProjectionHead, "moco": MoCoProjectionHead, "byol": BYOLProjectionHead}
    head = heads[name](body.channels, 512, 64)
    predictor = BYOLPredictionHead(64, 512, 64) if name == "byol" else nn.Identity()
    slow_body, slow_head = copy.deepcopy(body), copy.deepcopy(head)
    deactivate_requires_grad(slow_body)
    deactivate_requires_grad(slow_head)
    contrast = NTXentLoss(0.2, memory_bank_size=(2048, 64)) if name == "moco" else NTXentLoss(0.2)
    cosine = NegativeCosineSimilarity()
    parameters = [*body.parameters(), *head.parameters(), *predictor.parameters()]
    adam = torch.optim.Adam(parameters, 1e-3)
    first, second = pictures

    def slow(images: Tensor) -> Tensor:
        with torch.no_grad():
            keys: Tensor = slow_head(slow_body(images)).detach()
        return keys

    def step() -> None:
        if name != "simclr":
            update_momentum(body, slow_body, m=0.99)
            update_momentum(head, slow_head, m=0.99)
        if name == "simclr":
            loss = contrast(head(body(first)), head(body(second)))
        elif name == "moco":
            loss = contrast(head(body(first)), slow(second))
        else:
            predicted = [predictor(head(body(images))) for images in pictures]
            loss = (cosine(predicted[0], slow(second)) + cosine(predicted[1], slow(first))) / 2
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


# ---------------------------------------------------------------------------------------------- evaluation


def measures(images: int) -> Iterator[Row]:
    """Yield rows of feature extraction, kNN and a grid of linear probes."""
    sizes = evaluation.Sizes(images=8, bank=500, queries=20, fitted=200, rates=(1e-2,), epochs=1)
    sizes = sizes if images < TINY else evaluation.Sizes()
    kinds = {"features": evaluation.extraction, "kNN": evaluation.neighbours, "probe grid": evaluation.probes}
    for name, make in kinds.items():
        work = make(sizes)
        ours = next(key for key in work if "ours" in key)
        yield Row(name, {OURS: work[ours], **{k: v for k, v in work.items() if "ours" not in k}})


GROUPS: Mapping[str, Callable[[int], Iterable[Row]]] = {
    "views": views,
    "losses": losses,
    "steps": steps,
    "evaluation": measures,
}


def measured(row: Row, rounds: int, seconds: float) -> dict[str, float]:
    """Return the median seconds of each library."""
    taken = alternate(row.work, rounds=rounds, limit=seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def machine() -> str:
    """Return the processor, its cores and fast formats, and the versions of all libraries, in one line."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(": ")[2] for line in info.splitlines() if "model name" in line), platform.machine())
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in info]
    names = ("torch", "torchvision", "lightly", "albumentations", "kornia")
    versions = [f"{package} {version(package)}" for package in names if _installed(package)]
    return f"{name}, {torch.get_num_threads()} threads, {', '.join(fast)}; {', '.join(versions)}"


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def main(words: Sequence[str] | None = None) -> None:
    """Measure the groups, print a table, and write it as JSON and Markdown with `--to`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="no round of a row begins after this time")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--tiny", action="store_true", help="one round of a few images, to see that it runs")
    options = parser.parse_args(words)
    if unknown := set(options.groups) - GROUPS.keys():
        parser.error(f"{min(unknown)} is not a group; take {', '.join(GROUPS)}")
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table("what", "library", "median", "times that of ours", title=machine())
    found: list[dict[str, Any]] = []
    for group in options.groups or GROUPS:
        for row in GROUPS[group](8 if options.tiny else 256):
            seconds = measured(row, 1 if options.tiny else options.rounds, options.seconds)
            for library, taken in seconds.items():
                ratio = taken / seconds[OURS]
                table.add_row(row.name, library, f"{1e3 * taken:,.1f} ms", f"{ratio:.2f}")
                found.append({"row": row.name, "library": library, "seconds": taken, "ratio": ratio})
            table.add_section()
        if group == "losses" and _installed("lightly") and not options.tiny:
            count = 4096
            memory = {which: peak(which, count) for which in (OURS, "lightly")}
            for which, megabytes in memory.items():
                ratio = megabytes / max(memory[OURS], 0.1)
                table.add_row(f"NT-Xent, {count} pairs, memory", which, f"{megabytes:.0f} MB", f"{ratio:.1f}")
                found.append({"row": f"NT-Xent, {count} pairs, memory", "library": which, "megabytes": megabytes})
            table.add_section()
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    if options.to is not None:
        options.to.mkdir(parents=True, exist_ok=True)
        (options.to / "peers.json").write_text(json.dumps({"machine": machine(), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
