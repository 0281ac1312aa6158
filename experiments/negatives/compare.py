"""Measure how much of an image's texture and of its class each kind of non-semantic negative keeps.

python experiments/negatives/compare.py RUN [--images 2000] [--to FOLDER] [--tiny]

RUN is a supervised run on a data set of its own (python -m icl_msr.run method=supervised ...). A linear probe on its
encoder, fitted to the training images, is asked for the class of test images and of what each generator makes of
them; and the test images' colours and filter responses are compared with those of what was made:

* gram: distance of the Gram matrices of the responses of 24 filters (Gaussian derivatives, four directions, two kinds,
  three scales) and the three colours (Gatys et al. 2015 with a fixed bank in place of a trained network), over the norm
  of the image's, median over images; 0 is the same texture by this measure;
* histogram: Wasserstein-1 distance of the distributions of those 27 responses, each over the standard deviation of the
  image's, mean over responses, median over images.

Two controls: another test image of any class, and white noise with the image's colours (mean and covariance).
Prints a table and writes compare.csv into `--to`, beside this file unless told otherwise.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from icl_msr.core.config import build, config_dir
from icl_msr.core.folder import RunFolder
from icl_msr.core.randomness import keys
from icl_msr.core.tables import csv_text
from icl_msr.data.dataset import normalise
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.linear import fit_linear_probe
from icl_msr.models.exported import load_encoder

Generator = Callable[[Tensor, Tensor], Tensor]


def generators() -> dict[str, Generator]:
    """Return the generators of conf/negatives, with some keys changed, and the controls."""

    def negatives(name: str, **changes: Any) -> Generator:
        node: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "negatives" / f"{name}.yaml"))
        made: Generator = build({**node, **changes})
        return lambda images, key: made(images, key)[:, 0]

    return {
        "the image itself": lambda images, key: images,
        "patch": negatives("patch"),
        "patch, smallest alone (16 of 224)": negatives("patch", largest=16),
        "patch, 32 of 224 alone": negatives("patch", smallest=32, largest=32),
        "patch, largest alone (72 of 224)": negatives("patch", smallest=72),
        "patch, shuffle": negatives("patch", shuffle=True),
        "patch, flips and rotations": negatives("patch", flips=True, rotations=True),
        "texture": negatives("texture"),
        "texture, 16 candidates": negatives("texture", candidates=16),
        "texture, 512 candidates": negatives("texture", candidates=512),
        "texture, blocks of 24": negatives("texture", block=24),
        "texture, blocks of 60": negatives("texture", block=60, overlap=10),
        "phase": negatives("phase"),
        "another image": lambda images, key: images.roll(1, 0),
        "white noise": white_noise,
    }


def white_noise(images: Tensor, key: Tensor) -> Tensor:
    """Return independent pixels with the mean and covariance of the image's colours."""
    n, c, height, width = images.shape
    pixels = images.flatten(2)
    mean = pixels.mean(2, keepdim=True)
    covariance = (pixels - mean) @ (pixels - mean).mT / pixels.shape[2] + 1e-6 * torch.eye(c)
    noise = torch.randn(n, c, height * width, generator=torch.Generator().manual_seed(0))
    coloured: Tensor = mean + torch.linalg.cholesky(covariance) @ noise
    return coloured.view_as(images)


def bank(size: int = 13) -> Tensor:
    """Return first and second derivatives of Gaussians of three widths in four directions, of unit norm.

    The result is (24, 1, size, size).
    """
    line = torch.arange(size) - size // 2.0
    y, x = torch.meshgrid(line, line, indexing="ij")
    filters = []
    for sigma in (0.8, 1.4, 2.4):
        for quarter in range(4):
            along = x * math.cos(quarter * math.pi / 4) + y * math.sin(quarter * math.pi / 4)
            bell = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
            for derivative in (-along / sigma * bell, ((along / sigma) ** 2 - 1) * bell):
                kernel = derivative - derivative.mean()
                filters.append(kernel / kernel.norm())
    return torch.stack(filters)[:, None]


def responses(images: Tensor) -> Tensor:
    """Return colours and responses of the bank to the luminance, (N, 27, P), at all places."""
    grey = images.mean(1, keepdim=True)
    filtered = F.conv2d(F.pad(grey, (6, 6, 6, 6), mode="reflect"), bank())
    return torch.cat([images, filtered], dim=1).flatten(2)


class Appearance:
    """Filter statistics of images, kept to compare others with them."""

    def __init__(self, images: Tensor) -> None:
        seen = responses(images)
        self.gram = seen @ seen.mT / seen.shape[2]
        self.sorted, self.spread = seen.sort(2).values, seen.std(2).clamp(min=1e-3)

    def distances(self, other: "Appearance") -> tuple[Tensor, Tensor]:
        """Return `gram` and `histogram` of each image, (N,); see the module's docstring."""
        gram = (other.gram - self.gram).flatten(1).norm(dim=1) / self.gram.flatten(1).norm(dim=1)
        return gram, ((self.sorted - other.sorted).abs().mean(2) / self.spread).mean(1)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    parser.add_argument("--tiny", action="store_true", help="16 images, to see that it runs")
    options = parser.parse_args(words)
    run, count = RunFolder(options.run), 16 if options.tiny else options.images
    dataset = build(OmegaConf.create(run.saved_config()["dataset"]))
    encoder, about = load_encoder(run.path)
    encoder = encoder.eval().to(memory_format=torch.channels_last)
    shown: dict[str, Any] = {"mean": about["mean"], "std": about["std"], "device": "cpu", "batch_size": 256}
    classes = len(dataset.classes)
    probe = fit_linear_probe(
        extract(encoder, dataset.train, **shown),
        dataset.train.labels,
        classes,
        learning_rates=[1e-3, 3e-3, 1e-2],
        epochs=20,
        batch_size=256,
        held_out=0.2,
        seed=0,
    )
    split = next(iter(dataset.tests))
    test = dataset.tests[split]
    index = torch.linspace(0, len(test) - 1, min(count, len(test))).round().long()
    # In random order, so that "another image" can be of any class.
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    right: dict[str, float] = dict.fromkeys(generators(), 0.0)
    found: dict[str, list[Tensor]] = {name: [] for name in right}
    for part in torch.split(index, 256):
        images = normalise(test.load(part), about["mean"], about["std"])
        source = Appearance(images)
        for name, make in generators().items():
            made = make(images, keys(0, 0, part, view=-1))
            with torch.inference_mode():
                scores = probe(encoder(made.contiguous(memory_format=torch.channels_last)).float())
            right[name] += float((scores.argmax(1) == test.labels[part]).sum())
            found[name].append(torch.stack(source.distances(Appearance(made))))
    rows: list[dict[str, Any]] = []
    for name, parts in found.items():
        gram, histogram = torch.cat(parts, dim=1).median(dim=1).values.tolist()
        percent = 100 * right[name] / len(index)
        rows.append({"generator": name, "gram": gram, "histogram": histogram, "class_read_percent": percent})
    title = f"{len(index)} images of {split}, {classes} classes (chance {100 / classes:.1f} %), {run.path.name}"
    table = Table(title=title)
    for column in ("generator", "gram", "histogram", "class read, %"):
        table.add_column(column, justify="left" if column == "generator" else "right")
    for row in rows:
        cells = (f"{row['gram']:.2f}", f"{row['histogram']:.2f}", f"{row['class_read_percent']:.1f}")
        table.add_row(str(row["generator"]), *cells)
    Console(width=100).print(table)
    lines = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    (options.to / "compare.csv").write_text(csv_text([rows[0], *lines]))


if __name__ == "__main__":
    main()
