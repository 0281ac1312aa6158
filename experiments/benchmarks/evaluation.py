"""Measure the speed of the evaluation, as ratios of medians of alternating rounds in one run.

python experiments/benchmarks/evaluation.py [--threads 2] [--rounds 3] [--seconds 300] [--tiny]

* features of 2,048 images of 32 px by ResNet-18, in full and in half precision, against a plain Lightning prediction
  loop over a DataLoader;
* kNN of 50,000 x 10,000 features of 512 channels, preset instdisc (k = 200), against lightly's `knn_predict`, called as
  its kNN callback does, a batch of 512 queries at a time; the predictions are compared too;
* the linear probe's grid of 7 learning rates on 10,000 features of 512 channels and 100 classes, five epochs, against
  one plain Lightning loop for each learning rate.

No round of a part begins after `--seconds`.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from experiments.benchmarks.timing import Work, alternate
from icl_msr.data.dataset import ArraySplit
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import knn_predict
from icl_msr.evaluation.linear import fit_linear_probe
from icl_msr.models.backbones import resnet

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}


class Predictor(pl.LightningModule):
    """A plain Lightning prediction loop without this package."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        """Return pooled features (N, c) of uint8 images."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        features: Tensor = self.encoder((batch[0].float() / 255 - mean) / std)
        return features


class Probe(pl.LightningModule):
    """Softmax regression with Adam."""

    def __init__(self, channels: int, classes: int, rate: float):
        super().__init__()
        self.head, self.rate = nn.Linear(channels, classes), rate

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the cross-entropy of a batch."""
        return cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with this probe's learning rate."""
        return torch.optim.Adam(self.parameters(), self.rate)


@dataclass
class Sizes:
    """Sizes of all parts of the benchmark."""

    images: int = 2048
    bank: int = 50_000
    queries: int = 10_000
    fitted: int = 10_000
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    epochs: int = 5


def extraction(sizes: Sizes) -> Work:
    """Return work that computes features of uint8 images with ResNet-18."""
    encoder = resnet(32, name="resnet18", stem="auto", weights=None).eval()
    ours = encoder.to(memory_format=torch.channels_last)
    plain = Predictor(resnet(32, name="resnet18", stem="auto", weights=None).eval())
    images = torch.randint(256, (sizes.images, 3, 32, 32), dtype=torch.uint8)
    split = ArraySplit(images, torch.zeros(sizes.images, dtype=torch.int64))
    keys: dict[str, Any] = {"mean": MEAN, "std": STD, "device": "cpu", "batch_size": 256}
    return {
        "features, plain Lightning loop": lambda: pl.Trainer(**QUIET).predict(
            plain, DataLoader(TensorDataset(images), batch_size=256)
        ),
        "features, ours": lambda: extract(ours, split, **keys),
        "features, ours, bf16": lambda: extract(ours, split, autocast=torch.bfloat16, **keys),
    }


def neighbours(sizes: Sizes) -> Work:
    """Return work that predicts classes with kNN."""
    centres = torch.randn(10, 512)
    labels, asked = torch.randint(10, (sizes.bank,)), torch.randint(10, (sizes.queries,))
    bank = centres[labels] + 4 * torch.randn(sizes.bank, 512)
    queries = centres[asked] + 4 * torch.randn(sizes.queries, 512)

    def lightly() -> Tensor:
        columns, rows = normalize(bank).T, normalize(queries)
        return torch.cat([lightly_knn(r, columns, labels, 10, 200, 0.1)[:, 0] for r in torch.split(rows, 512)])

    return {"kNN, lightly": lightly, "kNN, ours": lambda: knn_predict(bank, labels, queries, "instdisc", 10)}


def probes(sizes: Sizes) -> Work:
    """Return work that trains linear probes over the grid of learning rates."""
    features, classes = torch.randn(sizes.fitted, 512), torch.randint(100, (sizes.fitted,))

    def loops() -> None:
        for rate in sizes.rates:
            loader = DataLoader(TensorDataset(features, classes), batch_size=256, shuffle=True)
            pl.Trainer(**QUIET, max_epochs=sizes.epochs).fit(Probe(512, 100, rate), loader)

    grid: dict[str, Any] = {"epochs": sizes.epochs, "batch_size": 256, "held_out": 0.2, "seed": 0}
    return {
        "probe grid, plain Lightning loops": loops,
        "probe grid, ours (and the fit of the best)": lambda: fit_linear_probe(
            features, classes, 100, learning_rates=sizes.rates, **grid
        ),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure the parts and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tiny", action="store_true", help="one round of a few images, to see that it runs")
    options = parser.parse_args(words)
    sizes = Sizes(images=8, bank=500, queries=20, fitted=200, rates=(1e-2,), epochs=1) if options.tiny else Sizes()
    rounds = 1 if options.tiny else options.rounds
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    table = Table(title=f"Evaluation, {options.threads} threads, medians of at most {rounds} alternating rounds")
    for column in ("what", "seconds", "times as fast"):
        table.add_column(column, justify="left" if column == "what" else "right")
    nearest = neighbours(sizes)
    for work in (extraction(sizes), nearest, probes(sizes)):
        seconds = alternate(work, rounds=rounds, limit=options.seconds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        first = next(iter(medians.values()))
        for name, median in medians.items():
            table.add_row(name, f"{median:.2f}", f"{first / median:.2f}")
        table.add_section()
    Console(width=100).print(table)
    theirs, ours = (call() for call in nearest.values())
    assert isinstance(theirs, Tensor)
    assert isinstance(ours, Tensor)
    print(f"kNN: {100 * (theirs == ours).float().mean():.2f} % of the predictions are lightly's.")


if __name__ == "__main__":
    main()
