"""Measure the speed of non-semantic negatives in images per second: medians of alternating rounds in one run.

python experiments/benchmarks/negatives.py [--threads 2] [--device cpu] [--sizes 32 96 224] [--seconds 2] [--rounds 7]
    [--without WORD] [--tiny]

* patch negatives of float32, bfloat16 and uint8 queries against the official loop over images, reimplemented from its
  description;
* phase negatives;
* texture negatives against image quilting in numpy, image by image, once with as many random candidates and once with
  all blocks, as in the textbook.

A round has as many images as take about `--seconds`, a batch at a time, and at least one image.
`--without "all blocks"` leaves out the slowest part.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.benchmarks.timing import alternate, stopwatch
from icl_msr.core.config import build, config_dir
from icl_msr.core.randomness import keys
from icl_msr.negatives import PatchNegatives, PhaseNegatives, TextureNegatives

Array = NDArray[np.float32]
BATCH = {32: 256, 96: 128, 224: 64}
"""Batch size by the side of the images."""


def generator(name: str) -> object:
    """Build a generator with the values of its YAML file."""
    return build(OmegaConf.to_container(OmegaConf.load(config_dir() / "negatives" / f"{name}.yaml")))  # type: ignore[arg-type]


def patch_loop(query: Tensor, patch: PatchNegatives) -> Tensor:
    """Return patch negatives of the official procedure, image by image (Ge et al. 2021, section 3)."""
    side = query.shape[-1]
    low, high = patch.sizes(side)
    results = []
    for image in query:
        d = int(torch.randint(low, high + 1, ()))
        tiles = side // d + 1
        rows = []
        for _ in range(tiles):
            corners = torch.randint(0, side - d, (tiles, 2)).tolist()
            rows.append(torch.cat([image[:, y : y + d, x : x + d] for y, x in corners], dim=2))
        results.append(torch.cat(rows, dim=1)[:, :side, :side])
    return torch.stack(results)


def numpy_quilting(
    image: Array, texture: TextureNegatives, random: np.random.Generator, candidates: int | None
) -> Array:
    """Return one texture (C, H, W) by plain quilting. `candidates` None compares all blocks of both examples."""
    _, height, width = image.shape
    side, block, overlap = texture.sizes(min(height, width))
    top, left = random.integers(0, (height - side + 1, width - side + 1))
    examples = [
        image[:, y : y + side, x : x + side] for y, x in (((height - side) // 2, (width - side) // 2), (top, left))
    ]
    step, free = block - overlap, side - block + 1
    down, across = (-(-(s - overlap) // step) for s in (height, width))
    canvas = np.zeros((len(image), overlap + step * down, overlap + step * across), np.float32)
    every = [(e, y, x) for e in range(2) for y in range(free) for x in range(free)]
    for r in range(down):
        for c in range(across):
            where = (slice(None), slice(r * step, r * step + block), slice(c * step, c * step + block))
            old = canvas[where]
            known = np.zeros((block, block), bool)
            known[: overlap * (r > 0)] = known[:, : overlap * (c > 0)] = True
            places = every if candidates is None else [every[k] for k in random.integers(0, len(every), candidates)]
            errors = np.array(
                [(((examples[e][:, y : y + block, x : x + block] - old) * known) ** 2).sum() for e, y, x in places]
            )
            good = np.flatnonzero(errors <= (1 + texture.tolerance) * errors.min())
            e, y, x = places[random.choice(good)]
            new = examples[e][:, y : y + block, x : x + block]
            difference = ((new - old) ** 2).sum(0)
            keep = np.zeros((block, block), bool)
            if c > 0:
                keep |= np.arange(block) < _cut(difference[:, :overlap])[:, None]
            if r > 0:
                keep |= np.arange(block)[:, None] < _cut(difference[:overlap].T)
            canvas[where] = np.where(keep, old, new)
    return canvas[:, :height, :width]


def _cut(error: Array) -> NDArray[np.int64]:
    """Return the column in each row of the path of least difference."""
    total = error.copy()
    for i in range(1, len(total)):
        padded = np.pad(total[i - 1], 1, constant_values=np.inf)
        total[i] += np.minimum(np.minimum(padded[:-2], padded[1:-1]), padded[2:])
    path = [int(total[-1].argmin())]
    for line in total[-2::-1]:
        first = max(path[-1] - 1, 0)
        path.append(first + int(line[first : path[-1] + 2].argmin()))
    return np.array(path[::-1])


Pieces = dict[str, tuple[int, Callable[[], object]]]


def work(side: int, n: int, device: torch.device) -> Pieces:
    """Return every piece of work on batches of n images of a side: the number of images per call, and the call."""
    patch, phase, texture = generator("patch"), generator("phase"), generator("texture")
    assert isinstance(patch, PatchNegatives)
    assert isinstance(phase, PhaseNegatives)
    assert isinstance(texture, TextureNegatives)
    query = torch.randn(n, 3, side, side, device=device)
    whole = (query * 50 + 128).clamp(0, 255).byte()
    half, key = query.bfloat16(), keys(0, 0, torch.arange(n, device=device), -2)
    image, random = query[0].cpu().numpy(), np.random.default_rng(0)
    return {
        "patch, the official loop": (n, lambda: patch_loop(query, patch)),
        "patch, float32": (n, lambda: patch(query, key)),
        "patch, bfloat16": (n, lambda: patch(half, key)),
        "patch, uint8": (n, lambda: patch(whole, key)),
        "phase": (n, lambda: phase(query, key)),
        "texture, numpy, all blocks": (1, lambda: numpy_quilting(image, texture, random, None)),
        "texture, numpy, as many candidates": (1, lambda: numpy_quilting(image, texture, random, texture.candidates)),
        "texture": (n, lambda: texture(query, key)),
    }


def measure(pieces: Pieces, device: torch.device, seconds: float, rounds: int) -> dict[str, float]:
    """Return images per second of each piece, the median of rounds of about `seconds` each."""

    def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
        return lambda: [call() for _ in range(times)]

    times = {name: max(1, round(seconds / stopwatch(call, device))) for name, (_, call) in pieces.items()}
    calls = {name: repeated(call, times[name]) for name, (_, call) in pieces.items()}
    taken = alternate(calls, rounds=rounds, limit=math.inf, device=device)
    return {name: times[name] * pieces[name][0] / statistics.median(values) for name, values in taken.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Measure all pieces and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96, 224])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without", default=None)
    parser.add_argument("--tiny", action="store_true", help="one round of 4 images of 32 pixels, to see that it runs")
    options = parser.parse_args(words)
    if options.tiny:
        options.sizes, options.seconds, options.rounds = [32], 0.0, 1
    torch.set_num_threads(options.threads)
    rates = {}
    for side in options.sizes:
        pieces = work(side, 4 if options.tiny else BATCH.get(side, 64), options.device)
        pieces = {name: piece for name, piece in pieces.items() if not (options.without and options.without in name)}
        rates[side] = measure(pieces, options.device, options.seconds, options.rounds)
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else f"{options.threads} CPU threads"
    table = Table(title=f"negatives, images a second on {where} (times the slow version of the same)")
    table.add_column("what")
    for side in options.sizes:
        table.add_column(f"{side} px", justify="right")
    for name in rates[options.sizes[0]]:
        cells = []
        for side in options.sizes:
            slow = {"patch": "patch, the official loop", "texture": "texture, numpy, as many candidates"}.get(
                name.partition(",")[0]
            )
            ratio = f" ({rates[side][name] / rates[side][slow]:.1f}x)" if slow else ""
            cells.append(f"{rates[side][name]:,.4g}{ratio}")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
