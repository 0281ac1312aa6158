"""Features, kNN and a grid of linear probes; see `experiments/benchmarks/evaluation.py`."""

from collections.abc import Callable
from functools import partial

from experiments.benchmarks import evaluation
from experiments.benchmarks.peers.rows import OURS, Calls, Row, Size
from experiments.benchmarks.timing import Work


def rows(size: Size) -> list[Row]:
    """Return a row for each part of an evaluation."""
    few = evaluation.Sizes(images=8, bank=500, queries=20, fitted=200, rates=(1e-2,), epochs=1)
    sizes = few if size.tiny else evaluation.Sizes(images=1024)
    return [
        Row(f"features of {sizes.images} images, ResNet-18, 32 px", partial(_features, sizes)),
        Row(f"kNN, {sizes.bank} x {sizes.queries} x 512, k = 200", partial(_renamed, evaluation.neighbours, sizes)),
        Row(f"probe grid, {len(sizes.rates)} learning rates", partial(_renamed, evaluation.probes, sizes)),
    ]


def _features(sizes: evaluation.Sizes) -> Calls:
    """Return ours in fp32, as by default, and in bf16; both in channels_last. The loop is in fp32, contiguous."""
    work = evaluation.extraction(sizes)
    return {
        OURS: work["features, ours"],
        "ours, bf16": work["features, ours, bf16"],
        "plain Lightning loop": work["features, plain Lightning loop"],
    }


def _renamed(make: Callable[[evaluation.Sizes], Work], sizes: evaluation.Sizes) -> Calls:
    """Return the calls by the library, ours first."""
    work = {name.partition(", ")[2]: call for name, call in make(sizes).items()}
    ours = next(name for name in work if name.startswith("ours"))
    return {OURS: work.pop(ours), **work}
