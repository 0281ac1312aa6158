"""Measure how long commands take to begin, as ratios to what they import, medians of alternating rounds.

python experiments/benchmarks/startup.py [--rounds 5] [--tiny]

A help text, a composed config and mistakes are compared with `import torch`, the imports of a run with `import
pytorch_lightning, torchvision`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.benchmarks.timing import alternate

TORCH, LIGHTNING = "import torch", "import pytorch_lightning, torchvision"
RUN = "import icl_msr.cli.job, icl_msr.training, icl_msr.evaluation"
COMMANDS = {
    "run --help": (0, TORCH, 0.5),
    "run --cfg job": (0, TORCH, 0.5),
    "run method=mocco": (2, TORCH, 0.5),
    "run --sead=3": (2, TORCH, 0.5),
    "run +method.foo=1": (2, TORCH, 1.5),
    "run method.temperature=-1": (2, TORCH, 1.5),
    "run evaluation.images=-1": (2, TORCH, 1.5),
    "run trainer.max_epochs=many": (2, TORCH, 1.5),
    "report --help": (0, TORCH, 0.5),
    RUN: (0, LIGHTNING, 1.2),
}
"""A command: its exit code, what it is compared with, and the largest ratio that is aimed at."""


def line(command: str) -> list[str]:
    """Return the words of a command, or of a Python process that imports what it says."""
    if command.startswith("import "):
        return [sys.executable, "-c", command]
    door, *words = command.split()
    return [sys.executable, "-m", f"icl_msr.{door}", *words]


def call(command: str, folder: str, code: int = 0) -> None:
    """Run a command in `folder`; raise RuntimeError if it ends with another exit code."""
    path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        line(command), cwd=folder, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode != code:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.decode()[-500:]}")


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="two commands, once")
    options = parser.parse_args(words)
    commands = dict(list(COMMANDS.items())[2:3]) if options.tiny else COMMANDS
    with tempfile.TemporaryDirectory() as folder:
        work: dict[str, Callable[[], object]] = {name: partial(call, name, folder) for name in (TORCH, LIGHTNING)}
        work |= {name: partial(call, name, folder, code) for name, (code, _, _) in commands.items()}
        seconds = alternate(work, rounds=1 if options.tiny else options.rounds, limit=600)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = Table("command", "seconds", "ratio", "to", "aim")
    for name in (TORCH, LIGHTNING):
        table.add_row(name, f"{medians[name]:.2f}")
    for name, (_, base, aim) in commands.items():
        table.add_row(name, f"{medians[name]:.2f}", f"{medians[name] / medians[base]:.2f}", base, f"{aim:g}")
    Console(width=132, markup=False).print(table)


if __name__ == "__main__":
    main()
