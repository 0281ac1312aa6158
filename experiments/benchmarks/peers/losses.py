"""A forward and backward pass of the losses that other libraries have too, on embeddings of 128 channels in fp32."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.peers.rows import OURS, Calls, Row, Size, installed
from icl_msr.losses.contrastive import decoupled, nt_xent
from icl_msr.losses.decorrelation import barlow_twins, vicreg
from icl_msr.losses.regression import squared_distance

Loss = Callable[[Tensor, Tensor], Tensor]


def rows(size: Size) -> list[Row]:
    """Return a row for each loss and number of pairs."""
    counts = (512, 2048, 8192)[: size(3, 1)]
    return [
        Row(f"{name}, {count} pairs", partial(_passes, losses, count))
        for name, losses in _losses().items()
        for count in (*counts, *[4096] * (name == "NT-Xent" and not size.tiny))
    ]


def _passes(losses: dict[str, Loss], count: int) -> Calls:
    first, second = (torch.randn(count, 128, requires_grad=True) for _ in range(2))

    def both(loss: Loss) -> None:
        first.grad = second.grad = None
        torch.autograd.backward(loss(first, second))

    return {library: partial(both, loss) for library, loss in losses.items()}


def _losses() -> dict[str, dict[str, Loss]]:
    """Return the losses of each library by name."""
    found: dict[str, dict[str, Loss]] = {
        "NT-Xent": {OURS: lambda a, b: nt_xent(a, b, 0.5, None)},
        "DCL": {OURS: lambda a, b: decoupled(a, b, 0.5, None, None)},
        "Barlow Twins": {OURS: lambda a, b: barlow_twins(a, b, 0.005)},
        "VICReg": {OURS: lambda a, b: vicreg(a, b, 25.0, 25.0, 1.0)},
        "negative cosine": {OURS: squared_distance},
    }
    if installed("lightly"):
        from lightly import loss

        theirs = (loss.NTXentLoss(0.5), loss.DCLLoss(0.5), loss.BarlowTwinsLoss(0.005), loss.VICRegLoss())
        for name, module in zip(found, (*theirs, loss.NegativeCosineSimilarity()), strict=True):
            found[name]["lightly"] = module
    if installed("stable_pretraining"):
        from stable_pretraining import losses

        found["NT-Xent"]["stable-pretraining"] = losses.NTXEntLoss(0.5)
        found["Barlow Twins"]["stable-pretraining"] = losses.BarlowTwinsLoss()
        found["VICReg"]["stable-pretraining"] = losses.VICRegLoss()
        found["negative cosine"]["stable-pretraining"] = losses.NegativeCosineSimilarity()
    return {name: libraries for name, libraries in found.items() if len(libraries) > 1}
