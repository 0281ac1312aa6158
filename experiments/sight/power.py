"""Simulate the power of a study from its pilot: which cut of the learnt gap do so many seeds see?

    python experiments/sight/power.py experiments/sight/pilot/results.jsonl [--seeds 5]

The learnt gap is the gap of the trained encoder minus that of the untrained one. A study compares a row with its
baseline seed by seed, by Student's t. The spread of these differences is taken as if the rows had nothing in common,
which is the worst case: the root of two times the standard deviation over seeds, pooled over the rows of the pilot.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

GAP = "linear/train/original - mixed_rand"
UNTRAINED = " (untrained)"
CUTS = (0.1, 0.25, 0.5, 1.0)
MADE_UP = [{"row": "made up", "seed": seed, "metrics": {GAP: 20.0 + seed, GAP + UNTRAINED: 8.0}} for seed in range(3)]


def simulated(effect: float, spread: float, seeds: int, studies: int) -> float:
    """Return the share of simulated studies that see a difference.

    Args:
        effect: the true difference, in points.
        spread: the standard deviation of the differences over seeds, in points.
        seeds: of a study.
        studies: number of studies.
    """
    drawn = np.random.default_rng(0).normal(effect, spread, (studies, seeds))
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(seeds))
    return float((np.abs(t) > special.stdtrit(seeds - 1, 0.975)).mean())


def needed(spread: float, seeds: int) -> float:
    """Return the smallest true difference, in points, that is seen with a power of 80 %, by the noncentral t."""
    reach = special.stdtrit(seeds - 1, 0.975)
    return float(special.nctdtrinc(seeds - 1, 0.2, reach)) * spread / math.sqrt(seeds)


def table(records: Sequence[dict[str, Any]], seeds: int, studies: int) -> str:
    """Return Markdown: the learnt gap of each row of a pilot, and the power of a study with such a baseline."""
    rows: dict[str, list[dict[str, float]]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record["metrics"])
    several = [[run[GAP] for run in runs] for runs in rows.values() if len(runs) > 1]
    if not several:
        raise SystemExit("A spread needs two seeds of one row.")
    pooled = math.sqrt(statistics.fmean(statistics.variance(values) for values in several))
    spread = math.sqrt(2) * pooled
    heads = [
        "row",
        "seeds",
        "gap",
        "learnt gap",
        *(f"power, cut of {100 * cut:.0f} %" for cut in CUTS),
        "smallest cut seen",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, runs in rows.items():
        gap = statistics.fmean(run[GAP] for run in runs)
        learnt = gap - statistics.fmean(run[GAP + UNTRAINED] for run in runs)
        powers = [f"{100 * simulated(cut * learnt, spread, seeds, studies):.0f} %" for cut in CUTS]
        smallest = f"{100 * needed(spread, seeds) / learnt:.0f} %" if learnt > 0 else "nothing was learnt"
        lines.append(f"| {name} | {len(runs)} | {gap:.1f} | {learnt:.1f} | {' | '.join(powers)} | {smallest} |")
    return "\n".join(
        [*lines, "", f"Spread over seeds {pooled:.2f} points, of a difference {spread:.2f}; {seeds} seeds."]
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print the table of a pilot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="the results.jsonl of the pilot")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--studies", type=int, default=20000)
    parser.add_argument("--tiny", action="store_true", help="made-up results, few studies")
    options = parser.parse_args(words)
    if options.tiny:
        print(table(MADE_UP, options.seeds, 200))
    elif options.results is None:
        parser.error("name the results.jsonl of a pilot")
    else:
        records = [json.loads(line) for line in options.results.read_text().splitlines()]
        print(table(records, options.seeds, options.studies))


if __name__ == "__main__":
    main()
