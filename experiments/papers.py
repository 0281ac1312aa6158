"""Reproduce the tables of both papers. experiments/papers/*.yaml hold their numbers and the run behind each.

python experiments/papers.py list [PREFIX]                          every run, its published numbers and its command
python experiments/papers.py show RUN                               the numbers of a run and its composed config
python experiments/papers.py run PREFIX [seeds=0,1,2] [budget=0.02] [key=value ...]
python experiments/papers.py table [PREFIX]                         published, ours, difference, seeds, budget

A run is named after its paper, table and row, such as icl_msr/small/simclr_msr/cifar10, and PREFIX stands for all runs
that begin with it. `budget` is the share of the published length; drops and warm-up of the learning rate shrink too.
Further words, such as dataset.root=/data/imagenet, go to the run. Runs lie in runs/papers, and the same command
continues what is not yet done.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from icl_msr.cli.words import spelled_out
from icl_msr.core.config import config_dir
from icl_msr.core.records import TRAINED, Outcome

TABLES = Path(__file__).parent / "papers"
RUNS = Path("runs/papers")


@dataclass(frozen=True)
class Row:
    """A run of a paper, and what the paper says of it."""

    name: str
    title: str
    words: tuple[str, ...]
    published: Mapping[str, float | None]
    """Per cent by column; None if it is not given."""
    metrics: Mapping[str, str]
    """Names of the same numbers in results.json, where `*` stands for anything."""
    seeds: int
    """Number of runs behind a published number."""
    note: str = ""

    @property
    def command(self) -> str:
        """The command line of this run."""
        return shlex.join(["python", "-m", "icl_msr.run", *self.words])


def read_rows(prefix: str = "") -> list[Row]:
    """Return the rows whose name begins with `prefix`.

    Raises:
        SystemExit: there is none.
    """
    found = [row for file in sorted(TABLES.glob("*.yaml")) for row in _rows(file) if row.name.startswith(prefix)]
    if not found:
        raise SystemExit(f"No run begins with {prefix}; type: python experiments/papers.py list")
    return found


def _rows(file: Path) -> Iterator[Row]:
    paper: dict[str, Any] = yaml.safe_load(file.read_text())
    for table, content in paper["tables"].items():
        parts = content.get("parts", {"all": ""})
        for key, row in content["rows"].items():
            for part, values in row["published"].items():
                lines = (content.get("run", ""), row["run"], parts[part], row.get("parts", {}).get(part, ""))
                names = (file.stem, table, key, *([] if part == "all" else [part]))
                yield Row(
                    name="/".join(str(name) for name in names),
                    title=row["title"],
                    words=tuple(shlex.split(" ".join(lines))),
                    published=dict(zip(content["metrics"], values, strict=True)),
                    metrics=content["metrics"],
                    seeds=paper["seeds"],
                    note=row.get("note", ""),
                )


def composed(words: Sequence[str]) -> DictConfig:
    """Return the config of a command line."""
    words = spelled_out(words)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", words)


def shortened(row: Row, budget: float) -> list[str]:
    """Return the words of a run of `budget` times the published length, drops and warm-up included."""
    if budget == 1:
        return list(row.words)
    config = composed(row.words)
    epochs = max(1, round(budget * config.trainer.max_epochs))
    words = [*row.words, f"trainer.max_epochs={epochs}"]
    schedule = config.schedule
    words += [f"schedule.{key}={schedule[key] * budget:g}" for key in ("warmup_epochs",) if schedule.get(key)]
    words += [f"schedule.{key}={round(schedule[key] * budget)}" for key in ("warmup_steps",) if schedule.get(key)]
    if drops := schedule.get("drop_at"):
        words.append(f"schedule.drop_at=[{','.join(str(round(drop * budget)) for drop in drops)}]")
    return words


def folder(row: Row, budget: float, seed: int) -> Path:
    """Return the folder of a run."""
    return RUNS / row.name / f"{budget:g}" / str(seed)


def run(rows: Sequence[Row], seeds: Sequence[int] | None, budget: float, words: Sequence[str]) -> None:
    """Run what is not yet done, one run after the other. By default, there are as many seeds as in the paper."""
    for row in rows:
        for seed in range(row.seeds) if seeds is None else seeds:
            place = folder(row, budget, seed)
            if (place / "results.json").exists():
                continue
            begun = (place / "checkpoints" / "last.ckpt").exists()
            line = [f"resume={place}"] if begun else [*shortened(row, budget), *words, f"seed={seed}"]
            command = [sys.executable, "-m", "icl_msr.run", *line, *([] if begun else [f"hydra.run.dir={place}"])]
            print(f"{row.name}, seed {seed}", flush=True)
            if code := subprocess.run(command, check=False).returncode:
                raise SystemExit(code)


def ours(row: Row, place: Path) -> dict[str, float]:
    """Return the measured columns of a finished run, in per cent."""
    records = [record for record in Outcome.load(place).records.measurements if record.encoder == TRAINED]
    found = {}
    for column, pattern in row.metrics.items():
        values = [record.value for record in records if record.value is not None and fnmatchcase(record.name, pattern)]
        if values:
            found[column] = 100 * values[0]
    return found


def compared(rows: Sequence[Row]) -> Table:
    """Return the table of published and measured numbers, a line for each column and budget."""
    table = Table("run", "column", "published", "ours", "difference", "seeds", "share of the length")
    for row in rows:
        for place in sorted((RUNS / row.name).glob("[0-9]*")):
            runs = [ours(row, file.parent) for file in sorted(place.glob("*/results.json"))]
            for column, value in row.published.items():
                found = [numbers[column] for numbers in runs if column in numbers]
                if found:
                    mean = statistics.mean(found)
                    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
                    told = ("", "") if value is None else (f"{value:.2f}", f"{mean - value:+.2f}")
                    table.add_row(
                        row.name, column, told[0], f"{mean:.2f}{spread}", told[1], str(len(found)), place.name
                    )
    return table


def listed(rows: Sequence[Row]) -> Table:
    """Return the table of runs and their published numbers."""
    table = Table("run", "published", "runs", "command")
    for row in rows:
        told = ", ".join(f"{column} {'' if value is None else value}" for column, value in row.published.items())
        table.add_row(row.name, told, str(row.seeds), " ".join(row.words))
    return table


def main(words: Sequence[str] | None = None) -> None:
    """List, show, run or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", default="list", choices=["list", "show", "run", "table"])
    parser.add_argument("rest", nargs="*", help="PREFIX, seeds=..., budget=..., and words for the run")
    parser.add_argument("--tiny", action="store_true", help="list, as without any word")
    options = parser.parse_args(words)
    prefix = "".join(word for word in options.rest[:1] if "=" not in word)
    given = options.rest[1:] if prefix else options.rest
    console = Console(markup=False, width=None if sys.stdout.isatty() else 240)
    rows = read_rows(prefix)
    if options.verb == "list":
        console.print(listed(rows))
        console.print(f"{len(rows)} runs, {sum(v is not None for row in rows for v in row.published.values())} numbers")
    elif options.verb == "show":
        for row in rows:
            note = f" ({row.note})" if row.note else ""
            console.print(f"{row.name}: {row.title}{note}", *(f"{k} {v}" for k, v in row.published.items()), sep="\n  ")
            console.print(row.command, soft_wrap=True)
        if len(rows) == 1:
            console.print(OmegaConf.to_yaml(composed(rows[0].words)), soft_wrap=True)
    elif options.verb == "table":
        console.print(compared(rows))
    else:
        if not prefix:
            raise SystemExit("Name what is to run: python experiments/papers.py run icl_msr/small/simclr_msr/cifar10")
        known = {key: value for key, _, value in (word.partition("=") for word in given) if key in ("seeds", "budget")}
        seeds = [int(seed) for seed in known["seeds"].split(",")] if "seeds" in known else None
        more = [word for word in given if word.partition("=")[0] not in ("seeds", "budget")]
        run(rows, seeds, float(known.get("budget", 1)), more)


if __name__ == "__main__":
    main()
