"""Sweeps: a fresh process for each job, and a folder that the same command continues."""

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from icl_msr.cli.footprint import new_folder, refuse, run_folder
from icl_msr.cli.processes import Child, clean_environment, in_folder, passed_on
from icl_msr.cli.words import in_short, spelled_out
from icl_msr.core import trust
from icl_msr.core.compose import known_to_hydra
from icl_msr.core.config import check
from icl_msr.core.errors import PREEMPTED, UserError, reason
from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import outside_world_size
from icl_msr.core.saved import as_yaml
from icl_msr.core.storage import atomic_write, read_json

_OURS = ("hydra.sweep.", "hydra.launcher.", "hydra.sweeper.", "hydra.mode", "hydra/launcher", "hydra/sweeper")
"""Overrides that concern the sweep and not its jobs."""

_LONGEST = 64
"""W&B's limit for a job type, in characters."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    overrides: list[str]
    folder: RunFolder
    title: str
    metric: float | None
    """Metric of this run if it is finished, else None. Anything else in its folder is checked by the run itself."""


class ProcessLauncher:
    """Runs every job as `python -m icl_msr.run` in its own process, with one folder, one W&B run and one exit code.

    A finished job is skipped, and a job that was begun continues. A job that fails does not stop the others. With
    several jobs side by side, each writes to `job.log` in its folder.
    """

    exit_codes: ClassVar[list[int]] = []
    """Exit codes of the jobs that have ended. They give the exit code of the command."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.running: list[Child] = []
        self.signals: list[int] = []
        self.due = 0
        self.seconds: list[float] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives a launcher. `hydra_plugins` registers this class as one.

        Raises:
            UserError: `jobs` is not a whole number of at least 1.
        """
        if not isinstance(self.jobs, int) or self.jobs < 1:
            raise UserError(f"hydra.launcher.jobs={self.jobs} is not allowed; it should be a whole number, at least 1.")
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs and return their metrics to the sweeper. After a signal, wait for the running jobs and stop."""
        total = initial_job_idx + len(job_overrides)
        jobs = [self._job(initial_job_idx + i, list(words), total) for i, words in enumerate(job_overrides)]
        self.due += sum(job.metric is None for job in jobs)
        for job in jobs:
            job.folder.path.mkdir(parents=True, exist_ok=True)  # jobs that are never begun count too
        with passed_on(self.running) as self.signals, ThreadPoolExecutor(self.jobs) as pool:
            answers = list(pool.map(self._run, jobs))
        if self._stopped():
            print("The sweep was stopped; the same command continues it.", file=sys.stderr)
            sys.exit(PREEMPTED)
        return answers

    def _job(self, number: int, overrides: list[str], total: int) -> Job:
        config = checked_job(self.context, self.config, overrides, number)
        HydraConfig.instance().set_config(config)  # resolves ${hydra:...} in the folder's name
        folder = RunFolder(Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir))
        task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        metric = None
        with suppress(OSError, UserError):  # the job itself says what is damaged
            if folder.done and folder.config.read_bytes() == as_yaml(task).encode():
                metric = folder.metric()
        return Job(overrides, folder, " ".join([f"[{number + 1}/{total}]", *_varying(overrides)]), metric)

    def _stopped(self) -> bool:
        return bool(self.signals) or PREEMPTED in self.exit_codes

    def _run(self, job: Job) -> JobReturn:
        answer = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
        answer.return_value = float("nan")
        if job.metric is not None:
            answer.return_value = job.metric
            print(f"{job.title}: done before, {job.folder}", flush=True)
        elif not self._stopped():
            answer.return_value = self._execute(job)
        return answer

    def _execute(self, job: Job) -> float:
        print(f"{job.title}: {job.folder}", flush=True)
        began, code, metric = time.monotonic(), self._exit_code(job), float("nan")
        seconds, end, left = time.monotonic() - began, f"exit code {code}", ""
        if code == 0:
            metric = job.folder.metric()
            end = f"metric {metric:.4f}"
            self.seconds.append(seconds)
        self.exit_codes.append(code)
        waiting = self.due - len(self.exit_codes)
        if waiting and self.seconds:
            left = f"; about {_clock(mean(self.seconds) * waiting / self.jobs)} left"
        print(f"{job.title}: {end} after {_clock(seconds)}{left}", flush=True)
        return metric

    def _exit_code(self, job: Job) -> int:
        """Run the job's process and return its exit code, as a shell gives it."""
        theirs = [word for word in self.config.hydra.overrides.hydra if not word.startswith(_OURS)]
        environment = clean_environment(self.jobs)
        environment.setdefault("WANDB_RUN_GROUP", Path(str(self.config.hydra.sweep.dir)).name)
        if named := job_type(job.overrides):
            environment.setdefault("WANDB_JOB_TYPE", named)
        words = [*job.overrides, *theirs, *trust.word(), in_folder(job.folder.path)]
        if self.jobs == 1:
            process = Child(words, environment)
        else:
            with (job.folder.path / "job.log").open("ab") as log:
                process = Child(words, environment, log)
        self.running.append(process)
        code = process.wait()
        self.running.remove(process)
        process.leash.close()
        return code if code >= 0 else 128 - code


def checked_job(context: HydraContext, sweep: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
    """Return the composed and checked config of a job.

    Launchers check all jobs first, so that a mistake in the last one is found before the first one runs.

    Raises:
        UserError: a key or value is wrong.
    """
    config = context.config_loader.load_sweep_config(sweep, job_words(sweep, overrides))
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    with known_to_hydra(config):
        check(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    return config


def job_words(sweep: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a job, with keys of a plural group assigned to its choices; see `words.spelled_out`."""
    hydras: list[str] = list(sweep.hydra.overrides.hydra)
    return spelled_out(overrides, [word for word in hydras if word.startswith("hydra.searchpath=")])


class SweepRecord(Callback):
    """Writes `sweep.json`, which holds the command and whether all of its jobs are done."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Lock the folder until the end of the process, and say which jobs are done."""
        if (outside := outside_world_size() or 1) > 1:
            refuse(f"A sweep is started once, and {outside} processes were; add hydra/launcher=process instead.")
        self.folder = Path(str(config.hydra.sweep.dir))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        if not _locks(self.lock):
            refuse(f"{self.folder} is another process's sweep; wait for its end, or choose another hydra.sweep.dir.")
        if (self.folder / "sweep.json").exists():
            print(f"Continuing {self.folder}; jobs done so far: {self._state()[0]}.", flush=True)
        self._write(finished=False)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print how many jobs are done and how to go on."""
        done, all_jobs = self._state()
        if not all_jobs:
            refuse("The sweep has no jobs, because a list or a pattern in it gives no values; write them out.")
        self._write(finished=done == all_jobs)
        rest = "" if done == all_jobs else "; the same command finishes the others"
        compare = f" Compare them: python -m icl_msr.report {self.folder}" if done else ""
        print(f"Jobs done: {done} of {all_jobs}{rest}.{compare}", flush=True)
        os.close(self.lock)

    def _state(self) -> tuple[int, int]:
        jobs = [RunFolder(path) for path in self.folder.iterdir() if path.is_dir()]
        return sum(job.done for job in jobs), len(jobs)

    def _write(self, finished: bool) -> None:
        content = {"command": sys.argv[1:], "finished": finished}
        file = self.folder / "sweep.json"
        try:
            atomic_write(file, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            refuse(f"{file} cannot be written ({reason(error)}); choose another hydra.sweep.dir.")
        except UserError as error:
            refuse(str(error))


def sweep_folder(root: str) -> str:
    """Return the folder of this command's sweep if it was begun, is unfinished and is not running; else a new one."""
    for record in sorted(Path(root).glob("*/sweep.json"), reverse=True):
        try:
            content = read_json(record, "restore it from a copy to continue this sweep, or remove it")
        except UserError as damage:
            print(damage, file=sys.stderr)
            continue
        if content.get("command") == sys.argv[1:] and not content.get("finished"):
            folder = os.open(record.parent, os.O_RDONLY)
            try:
                if _locks(folder):
                    return str(record.parent)
            finally:
                os.close(folder)
    return new_folder(f"{root}/{datetime.now():%Y-%m-%d_%H-%M-%S}")


def register_resolvers() -> None:
    """Register `${run_folder:<root>,<name>}` and `${sweep_folder:<root>}`, which give all jobs of a sweep the same."""
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True, use_cache=True)


def sweep_group() -> str | None:
    """Return the name of the running sweep; None outside a sweep. A job's process reads it from W&B's variable."""
    hydra = HydraConfig.get()
    sweep = Path(str(hydra.sweep.dir)).name if hydra.mode == RunMode.MULTIRUN else None
    return os.environ.get("WANDB_RUN_GROUP") or sweep


def job_type(overrides: Sequence[str]) -> str | None:
    """Return a run's settings without its seed, as text: the overrides that the sweep varies, or else all overrides.

    A job in its own process reads it from W&B's variable.
    """
    named = [word for word in overrides if not word.startswith("seed=")]
    changed = [word for word in _varying(overrides) if word in named]
    return os.environ.get("WANDB_JOB_TYPE") or ",".join(changed or named)[:_LONGEST] or None


def _varying(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that a sweep changes from job to job: those that were not typed in this form."""
    typed = {in_short(word) for word in sys.argv[1:]}
    return [word for word in overrides if in_short(word) not in typed]


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _locks(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # another error means a file system without locks
    return True
