"""Sweeps whose jobs are done at once: a module in the program's place, and what it leaves."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from icl_msr.cli import processes, sweeps
from icl_msr.cli.command import Job, main
from icl_msr.cli.job import run
from icl_msr.cli.processes import clean_environment
from icl_msr.cli.sweeps import SweepRecord, checked_job
from icl_msr.core.saved import as_yaml
from icl_msr.core.signals import SIGNALS, give_back
from support.inprocess import loggers_put_back

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
from icl_msr.cli.processes import hold_leash

hold_leash()
*words, last = sys.argv[1:]
folder = Path(last.partition("=")[2].strip("'"))
seed = next(word.partition("=")[2] for word in words if word.startswith("seed="))
(folder / "environment").write_text(json.dumps({**os.environ, "WORDS": words}))
with (folder / "began").open("a") as file:
    file.write(f"{time.monotonic()} ")
print(f"job {seed} at work", flush=True)
exec(os.environ.get(f"JOB{seed}", ""))

known = Path(os.environ["CONFIGS"], folder.name)
(folder / "config.yaml").write_text(known.read_text() if known.exists() else "")
results = {"seed": 0, "metric": {"name": "a", "value": float(seed) / 10}, "wall_time_s": 10 - float(seed)}
results["final"] = {"knn a - b": float(seed)}
(folder / "results.json").write_text(json.dumps(results))
"""


class Answer(NamedTuple):
    """The exit code and the lines of a command."""

    code: int
    out: list[str]
    err: list[str]


def sweep_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Answer]]:
    """Yield `python -m icl_msr.run -m` in this process, with jobs that are done at once. `JOB<seed>` is their trouble.

    The metric of a job is a tenth of its seed, and its time is ten seconds minus its seed.
    """
    home, configs = tmp_path / "home", tmp_path / "configs"
    home.mkdir()
    configs.mkdir()
    (home / "fake_job.py").write_text(FAKE)

    def noted(context: HydraContext, sweep: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
        config = checked_job(context, sweep, overrides, number)
        task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        (configs / str(number)).write_text(as_yaml(task))  # as a run does; composing again takes a second
        return config

    held: list[SweepRecord] = []
    start, end = SweepRecord.on_multirun_start, SweepRecord.on_multirun_end

    def started(self: SweepRecord, config: DictConfig) -> None:
        start(self, config)
        held.append(self)

    def ended(self: SweepRecord, config: DictConfig) -> None:
        end(self, config)
        held.remove(self)

    monkeypatch.setattr(SweepRecord, "on_multirun_start", lambda self, config, **_: started(self, config))
    monkeypatch.setattr(SweepRecord, "on_multirun_end", lambda self, config, **_: ended(self, config))
    monkeypatch.setattr(sweeps, "checked_job", noted)
    monkeypatch.setenv("CONFIGS", str(configs))
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setattr(processes, "MODULE", "fake_job")
    monkeypatch.setattr(sys, "argv", ["icl_msr.run"])
    monkeypatch.chdir(tmp_path)

    def call(*words: str, job: Job = run) -> Answer:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            code = main(job, ["-m", *words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        give_back(handlers)
        while held:  # the end of a process releases its lock
            os.close(held.pop().lock)
        out, err = capfd.readouterr()
        return Answer(code, out.splitlines(), err.splitlines())

    with loggers_put_back():
        yield call


def began(folder: Path) -> int:
    """Return how often a job has been started."""
    return len((folder / "began").read_text().split()) if (folder / "began").exists() else 0


def only(root: Path) -> Path:
    """Return the only sweep below."""
    (folder,) = (root / "runs" / "sweeps").iterdir()
    return folder
