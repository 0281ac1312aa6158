"""Run grids of runs that are written down first. A grid can be resumed, and its results are kept as it grows.

python experiments/study.py run FOLDER [--jobs 2] [--dry] [NAME=PATH]...    the runs of FOLDER/grid.yaml not yet done
python experiments/study.py table FOLDER                                    FOLDER/table.md from FOLDER/results.jsonl

A row of a grid is a command line, its seeds, and optionally further evaluations (`then`) of the trained encoder. Each
finished run adds one line to results.jsonl: its command, its results and its machine. The table has means and standard
deviations over seeds. A row with a baseline also has paired differences, seed by seed, with their 95 % interval
(Student's t) and the smallest difference that a design of this spread and size detects in four cases of five. `--dry`
prints the commands of the runs and starts none.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import OmegaConf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from icl_msr.report.differences import paired
from icl_msr.report.runs import Run
from icl_msr.report.summary_tables import told

CURVES: tuple[str, ...] = (
    "loss",
    "loss/contrastive",
    "loss/msr",
    "online/knn",
    "msr/meta_grad_norm",
    "msr/uniformity_grad_norm",
)
CURVES += ("msr/uniformity", "msr/entropy", "msr/overlap", "msr/variation")
CURVES += tuple(f"negatives/similarity_{name}" for name in ("own", "positive", "others", "hardest"))


def rows(folder: Path, given: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the rows of the grid: `words` of the command line, `seeds`, `then`, and optionally a `baseline`.

    A $name in them stands for another entry of the grid or for a given path. Rows that lack one are left out. `then`
    names entries of `evaluations`: arguments of `python -m icl_msr.evaluate`.
    """
    grid: Any = OmegaConf.to_container(OmegaConf.load(folder / "grid.yaml"))
    parts = {key: value for key, value in grid.items() if isinstance(value, str)}

    def filled(line: str) -> str:
        for _ in range(2):  # an entry may name a path
            line = Template(line).safe_substitute(parts | given)
        return line

    found = {}
    for name, row in grid["rows"].items():
        then = {key: filled(grid["evaluations"][key]) for key in row.get("then", [])}
        line = filled(f"{grid['common']} {row['words']}")
        if "$" not in " ".join([line, *then.values()]):
            words = {key: words.split() for key, words in then.items()}
            found[name] = {"seeds": grid["seeds"], **row, "words": line.split(), "then": words}
    return found


Job = tuple[str, dict[str, Any], int]
"""Name of a row, the row, and a seed."""


def remaining(folder: Path, given: dict[str, str]) -> list[Job]:
    """Return the jobs that are not yet done."""
    done = {(record["row"], record["seed"]) for record in records(folder)}
    grid = rows(folder, given).items()
    return [(name, row, seed) for name, row in grid for seed in row["seeds"] if (name, seed) not in done]


def run(folder: Path, given: dict[str, str], jobs: int) -> None:
    """Run all jobs that are not yet done, one process per run, `jobs` at a time."""
    todo = remaining(folder, given)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lock = threading.Lock()
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(f"{len(records(folder))} done before", total=len(todo))

        def one(job: Job) -> None:
            name, row, seed = job
            record = {"row": name, "seed": seed, **execute(folder, name, row["words"], row["then"], seed)}
            text = json.dumps(record)
            for key, path in given.items():  # paths of data are private
                text = text.replace(path, f"${key}")
            with lock, (folder / "results.jsonl").open("a") as file:
                file.write(text + "\n")
            progress.advance(task)

        for future in [pool.submit(one, job) for job in todo]:
            future.result()


def execute(folder: Path, name: str, words: list[str], then: dict[str, list[str]], seed: int) -> dict[str, Any]:
    """Run the main job and further evaluations, and return their results and facts of the run.

    Metrics of a further evaluation have its name as a prefix.
    """
    place = Path("runs/studies") / folder.name / re.sub(r"[^\w.]+", "-", name) / str(seed)
    began = time.perf_counter()
    call("icl_msr.run", *words, f"seed={seed}", f"hydra.run.dir={place}")
    run = Run.load(place)
    metrics = numbers(run)
    for key, more in then.items():
        there = place / key
        if not (there / "results.json").exists():
            call("icl_msr.evaluate", f"run={place}", *more, f"to={there}")
        metrics |= {f"{key}: {metric}": value for metric, value in numbers(Run.load(there)).items()}
    curves = {name: [round(v, 6) for v in run.curves[name].values] for name in CURVES if name in run.curves}
    facts = {
        key: run.environment.get(key) for key in ("command", "commit", "config_hash", "torch", "hardware", "started")
    }
    return {"metrics": metrics, "curves": curves, "seconds": round(time.perf_counter() - began, 1), **facts}


def call(module: str, *words: str) -> None:
    """Run one command of the package. Its output is shown if it fails."""
    command = [sys.executable, "-m", module, *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}")


def numbers(run: Run) -> dict[str, float]:
    """Return every number, by the name that a user types, in per cent or points."""
    return {told(record): round(value, 3) for record, value in run.numbers.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(folder: Path) -> str:
    """Return Markdown: means and standard deviations of the grid's headline, paired differences, and their sources."""
    grid: Any = OmegaConf.to_container(OmegaConf.load(folder / "grid.yaml"))
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records(folder):
        found.setdefault(record["row"], {})[record["seed"]] = record
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in (name for name in grid["rows"] if name in found):
        measured = next(iter(found[name].values()))["metrics"]
        groups.setdefault(tuple(key for key in grid["headline"] if key in measured), []).append(name)
    lines = []
    for keys, names in groups.items():
        lines += [line("mean ± std, %", "seeds", *keys), line("---", *["---:"] * (1 + len(keys)))]
        for name in names:
            values = [[record["metrics"][key] for record in found[name].values()] for key in keys]
            lines.append(line(name, str(len(found[name])), *map(mean_and_std, values)))
        lines += ["", line("difference, points", "against", *keys), line("---", "---", *["---:"] * len(keys))]
        for name in names:
            baseline = grid["rows"][name].get("baseline")
            seeds = sorted(found[name].keys() & found.get(baseline, {}).keys())
            if len(seeds) > 1:
                pairs = [[found[name][s]["metrics"][k] - found[baseline][s]["metrics"][k] for s in seeds] for k in keys]
                lines.append(line(name, baseline, *map(difference, pairs)))
        lines += ["", *learnt(found, names, keys, grid["rows"])]
    return "\n".join(lines)


UNTRAINED = " (untrained)"


def learnt(
    found: dict[str, dict[int, dict[str, Any]]], names: Sequence[str], keys: Sequence[str], rows: dict[str, Any]
) -> list[str]:
    """Return the lines of a table of gaps: trained, untrained, and learnt, which is their difference seed by seed.

    The last column is the smallest change of the gap against the baseline that the design detects in four cases of
    five, as a share of the baseline's learnt gap. Above 100 %, a cure that removes all that was learnt would be missed.
    """
    lines = []
    for key in (key for key in keys if " - " in key):
        for name in names:
            runs = [record["metrics"] for record in found[name].values()]
            runs = [run for run in runs if key in run and key + UNTRAINED in run]
            gained = paired([run[key] - run[key + UNTRAINED] for run in runs])
            if gained is None:
                continue
            means = [f"{statistics.fmean(run[k] for run in runs):.1f}" for k in (key, key + UNTRAINED)]
            lines.append(line(name, key, str(len(runs)), *means, str(gained), _seen(found, name, rows, key)))
    if not lines:
        return []
    heads = ("gap, points", "of", "seeds", "trained", "untrained", "learnt", "a change seen, of the learnt gap")
    return [line(*heads), line("---", "---", *["---:"] * 5), *lines, ""]


def _seen(found: dict[str, dict[int, dict[str, Any]]], name: str, rows: dict[str, Any], key: str) -> str:
    baseline = rows[name].get("baseline")
    both = [
        (found[name][s]["metrics"], found[baseline][s]["metrics"]) for s in found[name].keys() & found.get(baseline, {})
    ]
    both = [(mine, other) for mine, other in both if key in mine and key in other and key + UNTRAINED in other]
    change = paired([mine[key] - other[key] for mine, other in both])
    if change is None:
        return ""
    gap = statistics.fmean(other[key] - other[key + UNTRAINED] for _, other in both)
    return f"{100 * change.detectable / gap:.0f} %" if gap > 0 else "nothing was learnt"


def line(*cells: str) -> str:
    """Return one row of Markdown."""
    return f"| {' | '.join(cells)} |"


def mean_and_std(values: list[float]) -> str:
    """Return mean and standard deviation as `12.3 ± 0.4`."""
    mean = f"{statistics.fmean(values):.1f}".replace("-", "−")
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def difference(values: list[float]) -> str:
    """Return a paired difference as `+1.2 (−0.3 to 2.7; 2.1)`, in bold if the interval leaves out zero."""
    found = paired(values)
    assert found is not None
    cell = f"{str(found)[:-1]}; {found.detectable:.1f})"
    return f"**{cell}**" if found.real else cell


def main(words: Sequence[str] | None = None) -> None:
    """Run a study, or write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("given", nargs="*", metavar="NAME=PATH")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_intermixed_args(words)
    given = dict(word.split("=", 1) for word in options.given)
    if options.dry:
        todo = remaining(options.folder, given)
        for _, row, seed in todo:
            print(shlex.join(["python", "-m", "icl_msr.run", *row["words"], f"seed={seed}"]))
        print(f"{len(todo)} runs are left, {len(records(options.folder))} are done.")
        return
    if options.what == "run":
        run(options.folder, given, options.jobs)
    (options.folder / "table.md").write_text(table(options.folder))
    print(table(options.folder))


if __name__ == "__main__":
    main()
