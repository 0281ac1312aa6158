"""Sweeps: a fresh process for each job, and a folder that the same command continues."""

import fcntl
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from icl_msr.callbacks.checkpoints import PREEMPTED
from icl_msr.checkpoint import atomic_write
from icl_msr.folder import RunFolder
from icl_msr.processes import clean_environment, passed_on, start

_OURS = ("hydra.sweep.", "hydra.launcher.", "hydra.sweeper.", "hydra.mode", "hydra/launcher", "hydra/sweeper")
"""What concerns the sweep and not its jobs."""

_LONGEST = 64
"""W&B's limit for a job type, in characters."""


class ProcessLauncher(Launcher):  # type: ignore[misc]
    """Runs every job as `python -m icl_msr.run` in a process of its own: one folder, one W&B run, one exit code.

    A job whose folder holds its results is left alone, and a job that was begun continues. One that fails does not stop
    the others. With several jobs side by side, each writes to `job.log` in its folder.
    """

    exit_codes: ClassVar[list[int]] = []
    """Of all jobs so far, for the exit code of the whole command."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.running: list[Popen[bytes]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """See Hydra's Launcher."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs the jobs and gives their metrics to the sweeper."""
        jobs = [
            self._job(initial_job_idx + i, list(overrides), initial_job_idx + len(job_overrides))
            for i, overrides in enumerate(job_overrides)
        ]
        with passed_on(self.running), ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(self._run, jobs))

    def _job(self, number: int, overrides: list[str], total: int) -> dict[str, Any]:
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
        return {"folder": folder, "overrides": overrides, "title": f"[{number + 1}/{total}] {' '.join(overrides)}"}

    def _run(self, job: dict[str, Any]) -> JobReturn:
        folder, title = RunFolder(job["folder"]), job["title"]
        answer = JobReturn(overrides=job["overrides"], status=JobStatus.COMPLETED)
        answer.return_value = float("nan")
        if folder.done:
            answer.return_value = folder.metric()
            print(f"{title}: done before, {folder}", flush=True)
            return answer
        if PREEMPTED in self.exit_codes:
            return answer
        print(f"{title}: {folder}", flush=True)
        folder.path.mkdir(parents=True, exist_ok=True)
        began, code = time.monotonic(), self._execute(job["overrides"], folder.path)
        self.exit_codes.append(code)
        if code == 0:
            answer.return_value = folder.metric()
        end = f"metric {answer.return_value:.4f}" if code == 0 else f"exit code {code}"
        print(f"{title}: {end} after {timedelta(seconds=round(time.monotonic() - began))}", flush=True)
        return answer

    def _execute(self, overrides: list[str], folder: Path) -> int:
        theirs = [word for word in self.config.hydra.overrides.hydra if not word.startswith(_OURS)]
        environment = clean_environment()
        environment.setdefault("WANDB_RUN_GROUP", Path(str(self.config.hydra.sweep.dir)).name)
        words = [*overrides, *theirs, f"hydra.run.dir='{folder}'"]
        if self.jobs == 1:
            process = start(words, environment)
        else:
            with (folder / "job.log").open("ab") as log:
                process = start(words, environment, log)
        self.running.append(process)
        code = process.wait()
        self.running.remove(process)
        return code if code >= 0 else 128 - code


class SweepRecord(Callback):  # type: ignore[misc]
    """Writes `sweep.json`: which command this is, and whether all of it is done."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """The folder is ours until the end of the process."""
        self.folder = Path(str(config.hydra.sweep.dir))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        _locks(self.lock)
        if (self.folder / "sweep.json").exists():
            print(f"Continuing {self.folder}: {self._state()[0]} jobs are done.", flush=True)
        self._write(finished=False)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Says what is missing."""
        done, all_jobs = self._state()
        self._write(finished=done == all_jobs)
        rest = "" if done == all_jobs else "; the same command finishes the others"
        print(f"{done} of {all_jobs} jobs are done{rest}. Compare them: python -m icl_msr.report {self.folder}")
        os.close(self.lock)

    def _state(self) -> tuple[int, int]:
        jobs = [RunFolder(path) for path in self.folder.iterdir() if path.is_dir()]
        return sum(job.done for job in jobs), len(jobs)

    def _write(self, finished: bool) -> None:
        content = {"command": sys.argv[1:], "finished": finished}
        atomic_write(self.folder / "sweep.json", json.dumps(content, indent=2) + "\n")


def sweep_folder(root: str) -> str:
    """Where this command's sweep lies if it was begun, is not finished and is not running; else a new folder."""
    for record in sorted(Path(root).glob("*/sweep.json"), reverse=True):
        content = json.loads(record.read_text())
        if content["command"] == sys.argv[1:] and not content["finished"]:
            folder = os.open(record.parent, os.O_RDONLY)
            try:
                if _locks(folder):
                    return str(record.parent)
            finally:
                os.close(folder)
    return f"{root}/{datetime.now():%Y-%m-%d_%H-%M-%S}"


def register_resolvers() -> None:
    """`${sweep_folder:<root>}`, the same for all jobs of a sweep."""
    OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True, use_cache=True)


def sweep_group() -> str | None:
    """The sweep that this process is in the middle of; a job in its own process hears of it from W&B's variable."""
    hydra = HydraConfig.get()
    return Path(str(hydra.sweep.dir)).name if hydra.mode == RunMode.MULTIRUN else None


def job_type(overrides: Sequence[str]) -> str | None:
    """What a run is, whatever its seed: the overrides without it."""
    named = ",".join(word for word in overrides if not word.startswith("seed="))
    return named[:_LONGEST] or None


def _locks(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
