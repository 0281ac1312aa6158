"""Compare the speed with that of other libraries: medians of alternating rounds in one run.

python -m experiments.benchmarks.peers [WHAT ...] [--budget 25] [--rounds 5] [--threads 2] [--to FOLDER] [--tiny]

The groups of rows are:

* views: two augmented views of images in memory;
* losses: forward and backward pass;
* steps: a training step of SimCLR, MoCo and BYOL;
* evaluation: features, kNN and a grid of linear probes;
* runs: whole commands, from the start of Python to the exported encoder, and to the first step.

WHAT is a group or a part of a row's name, such as `kNN`. Every row has one round after a first one that warms up, and
further rounds while its share of the budget (minutes) lasts. `make bench` runs it in an environment of its own. A
library that is not installed is left out. Memory is what a call adds at its peak; calls that start processes have none.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.peers import losses, measures, runs, steps, views
from experiments.benchmarks.peers.rows import OURS, OURS_AS_THEIRS, Row, Size, installed, plan
from experiments.benchmarks.timing import alternate, peak_memory

GROUPS: Mapping[str, Callable[[Size], list[Row]]] = {
    "views": views.rows,
    "losses": losses.rows,
    "steps": steps.rows,
    "evaluation": measures.rows,
    "runs": runs.rows,
}


@dataclass
class Result:
    """One library in one row."""

    row: str
    library: str
    seconds: float
    """Median."""
    rounds: int
    megabytes: float | None
    ratio: float
    """Its seconds by ours."""
    ratio_as_theirs: float | None
    """Its seconds by ours with the precision and memory format of the others."""


def measure(row: Row, rounds: int, seconds: float) -> list[Result]:
    """Return the results of a row; no round begins after `seconds`."""
    work, began = row.make(), time.perf_counter()
    megabytes: dict[str, float | None] = {}
    if row.own_memory:  # which warms up as well
        megabytes = {name: peak_memory(call) for name, call in work.items()}
    left = seconds - (time.perf_counter() - began)
    taken = alternate(work, rounds=rounds, limit=left, warm_up=row.warm_up and not row.own_memory)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    base = medians.get(OURS_AS_THEIRS)
    return [
        Result(
            row=row.name,
            library=name,
            seconds=median,
            rounds=len(taken[name]),
            megabytes=megabytes.get(name),
            ratio=median / medians[OURS],
            ratio_as_theirs=None if base is None else median / base,
        )
        for name, median in medians.items()
    ]


def machine() -> str:
    """Return the processor with its fast formats, the precision of both sides, and the versions of all libraries."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(": ")[2] for line in info.splitlines() if "model name" in line), platform.machine())
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in info]
    packages = {
        "torch": "torch",
        "torchvision": "torchvision",
        "lightly": "lightly",
        "albumentations": "albumentations",
    }
    packages |= {"stable_pretraining": "stable-pretraining", "kornia": "kornia"}
    versions = [f"{package} {version(package)}" for module, package in packages.items() if installed(module)]
    ours = f"ours: {plan().precision}, channels_last; others: fp32, contiguous"
    return f"{name}, {torch.get_num_threads()} threads, {', '.join(fast)}; {ours}\n{', '.join(versions)}"


def chosen(groups: Mapping[str, list[Row]], words: Sequence[str]) -> list[Row]:
    """Return the rows of all groups, or those that the words name."""
    rows = [(group, row) for group, rows in groups.items() for row in rows]
    return [row for group, row in rows if not words or any(word == group or word in row.name for word in words)]


def main(words: Sequence[str] | None = None) -> None:
    """Measure the rows, print a table, and write it as JSON and Markdown with `--to`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(GROUPS)}, or a part of a row's name; all by default")
    parser.add_argument("--budget", type=float, default=25.0, help="minutes that all rows share")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--tiny", action="store_true", help="one round of a few images, to see that it runs")
    options = parser.parse_args(words)
    rows = chosen({group: make(Size(options.tiny)) for group, make in GROUPS.items()}, options.what)
    if not rows:
        parser.error(
            f"no row is called {' or '.join(options.what)}; take {', '.join(GROUPS)}, or a part of a row's name"
        )
    warnings.filterwarnings("ignore")
    if installed("stable_pretraining"):
        import stable_pretraining  # noqa: F401 (it sets up its log)
        from loguru import logger

        logger.remove()
        logger.add(sys.stderr, level="ERROR")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ends = time.monotonic() + 60 * options.budget
    found: list[Result] = []
    try:
        for i, row in enumerate(rows):
            share = max(0.0, ends - time.monotonic()) / (len(rows) - i)
            found += measure(row, 1 if options.tiny else options.rounds, share)
            print(f"{i + 1}/{len(rows)} {row.name}", file=sys.stderr)
            if options.to is not None:
                _write(found, options.to)
    finally:  # a row that fails takes no other with it
        _print(found)


def _write(found: list[Result], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "rows": [asdict(result) for result in found]}
    (folder / "peers.json").write_text(json.dumps(record, indent=1))
    (folder / "peers.md").write_text(_markdown(found))


HEAD = ("what", "library", "median", "rounds", "memory", "by ours", "by ours in fp32, contiguous")


def _cells(result: Result) -> tuple[str, ...]:
    memory = "" if result.megabytes is None else f"{result.megabytes:,.0f} MB"
    same = "" if result.ratio_as_theirs is None else f"{result.ratio_as_theirs:.2f}"
    time_ = f"{1e3 * result.seconds:,.1f} ms"
    return result.row, result.library, time_, str(result.rounds), memory, f"{result.ratio:.2f}", same


def _print(found: list[Result]) -> None:
    table = Table(*HEAD, title=machine())
    for i, result in enumerate(found):
        table.add_row(*_cells(result), end_section=i + 1 == len(found) or found[i + 1].row != result.row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _markdown(found: list[Result]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, found)]
    return machine() + "\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
