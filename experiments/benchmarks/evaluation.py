"""Speed of the evaluation, as ratios: medians of alternating rounds in one run.

python experiments/benchmarks/evaluation.py [--threads 2] [--rounds 3]

* features of 2,048 images of 32 px by ResNet-18, in full and in half precision, against a plain Lightning prediction
  loop over a DataLoader;
* kNN of 50,000 x 10,000 features of 512 channels, preset instdisc (k = 200), against lightly's `knn_predict`, called as
  its kNN callback does, a batch of 512 queries at a time; the predictions are compared too;
* the linear probe's grid of 7 learning rates on 10,000 features of 512 channels and 100 classes, five epochs, against
  one plain Lightning loop for each learning rate.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader, TensorDataset

from icl_msr.data.dataset import ArraySplit
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import knn_predict
from icl_msr.evaluation.linear import fit_linear_probe
from icl_msr.models.backbones import resnet

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Predictor(pl.LightningModule):
    """What one writes without a framework."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        """Pooled features of uint8 images."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        features: Tensor = self.encoder((batch[0].float() / 255 - mean) / std)
        return features


class Probe(pl.LightningModule):
    """Softmax regression with Adam."""

    def __init__(self, channels: int, classes: int, rate: float):
        super().__init__()
        self.head, self.rate = nn.Linear(channels, classes), rate

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self.head(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """At this learning rate."""
        return torch.optim.Adam(self.parameters(), self.rate)


def alternate(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each piece of work; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    encoder = resnet(32, name="resnet18", stem="auto", weights=None).eval()
    images = torch.randint(256, (2048, 3, 32, 32), dtype=torch.uint8)
    split = ArraySplit(images, torch.zeros(2048, dtype=torch.int64))
    keys: dict[str, Any] = {"mean": MEAN, "std": STD, "device": "cpu", "batch_size": 256}
    ours = encoder.to(memory_format=torch.channels_last)
    plain = Predictor(resnet(32, name="resnet18", stem="auto", weights=None).eval())
    features = alternate(
        {
            "features, plain Lightning loop": lambda: pl.Trainer(**QUIET).predict(
                plain, DataLoader(TensorDataset(images), batch_size=256)
            ),
            "features, ours": lambda: extract(ours, split, **keys),
            "features, ours, bf16": lambda: extract(ours, split, autocast=torch.bfloat16, **keys),
        },
        options.rounds,
    )

    centres = torch.randn(10, 512)
    labels, asked = torch.randint(10, (50_000,)), torch.randint(10, (10_000,))
    bank, queries = centres[labels] + 4 * torch.randn(50_000, 512), centres[asked] + 4 * torch.randn(10_000, 512)

    def lightly() -> Tensor:
        columns, rows = normalize(bank).T, normalize(queries)
        return torch.cat([lightly_knn(r, columns, labels, 10, 200, 0.1)[:, 0] for r in rows.split(512)])

    same = (lightly() == knn_predict(bank, labels, queries, "instdisc", 10)).float().mean()
    knn = alternate(
        {"kNN, lightly": lightly, "kNN, ours": lambda: knn_predict(bank, labels, queries, "instdisc", 10)},
        options.rounds,
    )

    few, classes = bank[:10_000], torch.randint(100, (10_000,))

    def loops() -> None:
        for rate in RATES:
            loader = DataLoader(TensorDataset(few, classes), batch_size=256, shuffle=True)
            pl.Trainer(**QUIET, max_epochs=5).fit(Probe(512, 100, rate), loader)

    grid: dict[str, Any] = {"epochs": 5, "batch_size": 256, "held_out": 0.2, "seed": 0}
    probe = alternate(
        {
            "probe grid, plain Lightning loops": loops,
            "probe grid, ours (and the fit of the best)": lambda: fit_linear_probe(
                few, classes, 100, learning_rates=RATES, **grid
            ),
        },
        options.rounds,
    )

    table = Table(title=f"Evaluation, {options.threads} threads, medians of {options.rounds} alternating rounds")
    for column in ("what", "seconds", "times as fast"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for part in (features, knn, probe):
        first = next(iter(part.values()))
        for name, seconds in part.items():
            table.add_row(name, f"{seconds:.2f}", f"{first / seconds:.2f}")
        table.add_section()
    Console(width=100).print(table)
    print(f"kNN: {100 * same:.2f} % of the predictions are lightly's.")


if __name__ == "__main__":
    main()
