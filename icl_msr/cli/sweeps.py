"""Sweeps: a fresh process for each job, and a folder that the same command continues."""

import errno
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any
from zlib import crc32

import omegaconf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from icl_msr.cli.footprint import new_folder, refuse, run_folder
from icl_msr.cli.processes import Child, clean_environment, in_folder, passed_on, requeued
from icl_msr.cli.stopping import Stop, leave_if_stopped
from icl_msr.cli.words import in_short, spelled_out
from icl_msr.core import trust
from icl_msr.core.compose import known_to_hydra
from icl_msr.core.config import check
from icl_msr.core.errors import PREEMPTED, UserError, reason
from icl_msr.core.folder import SEARCHED, RunFolder
from icl_msr.core.ranks import outside_world_size
from icl_msr.core.saved import as_yaml
from icl_msr.core.storage import atomic_write, read_json

_OURS = ("hydra.sweep.", "hydra.launcher.", "hydra.sweeper.", "hydra.mode", "hydra/launcher", "hydra/sweeper")
"""Overrides that concern the sweep and not its jobs."""

PATIENCE = 2.0
"""Seconds in which another process that begins the same sweep writes its record."""

PAUSE = 1.0
"""Seconds between two looks at jobs that other processes run."""

_IN_OUR_HANDS = ("hydra_plugins.icl_msr.", "hydra._internal.")
"""Launchers whose jobs get the signals of the command."""

_LONGEST_TYPE, _LONGEST_NAME = 64, 128
"""W&B's limits for a job type and for the name of a run, in characters."""

_IN_A_NAME = ("method", "regularizer", "negatives", "hard_negatives", "background", "dataset", "backbone")
"""The groups whose choices are in the name of every run."""

_IF_CHOSEN = ("hard_negatives", "background")
"""Those that are in the name only if they are not `none`, as in few runs."""

_SWEPT = "ICL_MSR_SWEPT"
"""The variable that tells the process of a job what its sweep varies."""


exit_codes: list[int] = []
"""Exit codes of the jobs of this process's sweep that have ended. They give the exit code of the command."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: list[str]
    config: DictConfig
    """The composed config, without Hydra's part."""
    folder: RunFolder
    title: str

    def metric(self) -> float | None:
        """Return the metric of this run if it is finished, else None. The run itself says what is damaged."""
        with suppress(OSError, UserError):
            if self.folder.done and self.folder.config.read_bytes() == as_yaml(self.config).encode():
                return self.folder.metric()
        return None

    def answer(self, metric: float) -> JobReturn:
        """Return what Hydra's sweeper expects of a launcher."""
        answer = JobReturn(overrides=self.overrides, status=JobStatus.COMPLETED)
        answer.return_value = metric
        return answer


def planned(context: HydraContext, sweep: DictConfig, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
    """Return the jobs of a sweep, whose configs are checked, and make their folders. Jobs never begun count too.

    Raises:
        UserError: a key or value is wrong.
    """
    last = max(first + len(job_overrides), sweep.hydra.sweeper.get("n_trials") or 0)
    jobs = [plan(context, sweep, overrides, number, last) for number, overrides in enumerate(job_overrides, first)]
    for job in jobs:
        job.folder.path.mkdir(parents=True, exist_ok=True)
    return jobs


def plan(context: HydraContext, sweep: DictConfig, overrides: Sequence[str], number: int, last: int) -> Job:
    """Return a job of a sweep with `last` jobs, whose config is checked.

    Raises:
        UserError: a key or value is wrong.
    """
    config = checked_job(context, sweep, overrides, number)
    HydraConfig.instance().set_config(config)  # resolves ${hydra:...} in the folder's name
    folder = RunFolder(Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir))
    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return Job(number, list(overrides), task, folder, " ".join([f"[{number + 1}/{last}]", *varying(overrides)]))


def execute(sweep: DictConfig, job: Job, running: list[Child], beside: int = 1, log: bool = False) -> int:
    """Run a job of a sweep in a process of its own, and return the exit code as a shell gives it.

    Args:
        sweep: the config of the sweep.
        job: the job.
        running: the processes that this one passes signals on to; the job's is among them while it runs.
        beside: the jobs that share this machine's processors.
        log: whether the output goes to `job.log` in the job's folder.
    """
    words, environment = command_words(sweep, job), clean_environment(beside) | dashboard_variables(sweep, job)
    with (job.folder.path / "job.log").open("ab") if log else nullcontext() as output:
        process = Child(words, environment, output)
    running.append(process)
    code = process.wait()
    running.remove(process)
    process.leash.close()
    return code if code >= 0 else 128 - code


def command_words(sweep: DictConfig, job: Job) -> list[str]:
    """Return the words of `python -m icl_msr.run` that carry out one job of a sweep."""
    theirs = [word for word in sweep.hydra.overrides.hydra if not word.lstrip("+~").startswith(_OURS)]
    return [*job.overrides, *theirs, *trust.word(), in_folder(job.folder.path)]


def dashboard_variables(sweep: DictConfig, job: Job) -> dict[str, str]:
    """Return the variables by which W&B names and groups the runs of a sweep, unless the user has set them."""
    variables = {"WANDB_RUN_GROUP": Path(str(sweep.hydra.sweep.dir)).name, "WANDB_JOB_TYPE": job_type(job.overrides)}
    variables[_SWEPT] = swept(job.overrides)
    return {name: value for name, value in variables.items() if value and name not in os.environ}


class Claims:
    """The file `claims` of a sweep that several processes share: byte n is locked by the process that runs job n.

    The operating system releases the locks of a process that ends, and those of a machine that is gone. A byte that is
    not zero says that the job has failed.
    """

    def __init__(self, sweep: Path):
        self.path = sweep / "claims"

    def __enter__(self) -> "Claims":
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    @contextmanager
    def claimed(self, number: int) -> Iterator[bool]:
        """Claim a job inside the context, and yield whether that was possible."""
        ours = True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            ours = error.errno not in (errno.EAGAIN, errno.EACCES)  # another error means a file system without locks
        try:
            yield ours
        finally:
            if ours:
                with suppress(OSError):
                    fcntl.lockf(self.file, fcntl.LOCK_UN, 1, number)

    def fail(self, number: int) -> None:
        """Tell the other processes that a job has failed, so that they do not run it."""
        os.pwrite(self.file, b"1", number)

    def has_failed(self, number: int) -> bool:
        """Return whether a job has failed since the sweep was begun or continued."""
        return os.pread(self.file, 1, number) == b"1"


class ProcessLauncher:
    """Runs every job as `python -m icl_msr.run` in its own process, with one folder, one W&B run and one exit code.

    A finished job is skipped, and a job that was begun continues. A job that fails does not stop the others. With
    several jobs side by side, each writes to `job.log` in its folder.

    The same command, typed in several places over a shared folder, shares the jobs out; see `Claims`.
    """

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
        jobs = planned(self.context, self.config, job_overrides, initial_job_idx)
        self.due += sum(job.metric() is None for job in jobs)
        answers: dict[int, JobReturn | None] = {}
        with passed_on(self.running) as self.signals, Claims(Path(str(self.config.hydra.sweep.dir))) as self.claims:
            waiting = jobs
            while waiting:
                with ThreadPoolExecutor(self.jobs) as pool:
                    answers |= zip([job.number for job in waiting], pool.map(self._run, waiting), strict=True)
                if waiting := [job for job in waiting if answers[job.number] is None]:
                    time.sleep(PAUSE)  # another process runs these jobs, and may die
        if self._stopped():
            print("The sweep was stopped; the same command continues it.", file=sys.stderr)
            with requeued(bool(self.config.hardware.get("requeue"))):
                sys.exit(PREEMPTED)
        return [answer for answer in answers.values() if answer]

    def _stopped(self) -> bool:
        return bool(self.signals) or PREEMPTED in exit_codes

    def _run(self, job: Job) -> JobReturn | None:
        """Run a job and return its answer; None if another process runs it now."""
        with self.claims.claimed(job.number) as ours:
            if (metric := job.metric()) is not None:
                print(f"{job.title}: done before, {job.folder}", flush=True)
            elif self._stopped():
                metric = math.nan
            elif not ours:
                return None
            elif self.claims.has_failed(job.number):
                print(f"{job.title}: failed in another process, {job.folder}", flush=True)
                exit_codes.append(1)
                metric = math.nan
            else:
                metric = self._execute(job)
        return job.answer(metric)

    def _execute(self, job: Job) -> float:
        print(f"{job.title}: {job.folder}", flush=True)
        began, metric = time.monotonic(), math.nan
        code = execute(self.config, job, self.running, self.jobs, log=self.jobs > 1)
        seconds, end, left = time.monotonic() - began, f"exit code {code}", ""
        if code == 0:
            metric = job.folder.metric()
            end = f"metric {metric:.4f}"
            self.seconds.append(seconds)
        elif code != PREEMPTED:
            self.claims.fail(job.number)
        exit_codes.append(code)
        waiting = self.due - len(exit_codes)
        if waiting and self.seconds:
            left = f"; about {_clock(mean(self.seconds) * waiting / self.jobs)} left"
        print(f"{job.title}: {end} after {_clock(seconds)}{left}", flush=True)
        return metric


def checked_job(context: HydraContext, sweep: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
    """Return the composed and checked config of a job.

    Launchers check all jobs first, so that a mistake in the last one is found before the first one runs.

    Raises:
        UserError: a key or value is wrong.
    """
    config = context.config_loader.load_sweep_config(sweep, job_words(sweep, overrides))
    with open_dict(config):
        config.hydra.job.num, config.hydra.job.id = number, str(number)
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
        if self._joins():
            print(f"Joining {self.folder}, which another process has begun.", flush=True)
        else:
            (self.folder / "claims").unlink(missing_ok=True)  # jobs that have failed are tried again
            if _is_shared():
                _locks(self.lock, fcntl.LOCK_SH)
        if (self.folder / "sweep.json").exists():
            print(f"Continuing {self.folder}; jobs done so far: {self._state()[0]}.", flush=True)
        self._write(finished=False)
        if not str(config.hydra.launcher._target_).startswith(_IN_OUR_HANDS):
            stop = Stop(self.folder)
            stop.forget()  # of a command that was killed
            stop.answer_signals()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print how many jobs are done and how to go on."""
        if sys.exception():  # Hydra 1.4 calls this after an error too
            os.close(self.lock)
            return
        leave_if_stopped()
        done, all_jobs = self._state()
        if not all_jobs:
            refuse("The sweep has no jobs, because a list or a pattern in it gives no values; write them out.")
        finished = done == all_jobs or (self.folder / SEARCHED).exists()
        self._write(finished)
        rest = "" if finished else "; the same command finishes the others"
        compare = f" Compare them: python -m icl_msr.report {self.folder}" if done else ""
        print(f"Jobs done: {done} of {all_jobs}{rest}.{compare}", flush=True)
        if not (finished or exit_codes):  # the processes of another launcher have their exit codes
            exit_codes.append(1)
        os.close(self.lock)

    def _joins(self) -> bool:
        """Lock the folder, and return whether another process runs the same sweep in it. Refuse any other one."""
        deadline = time.monotonic() + PATIENCE
        while not _locks(self.lock):
            with suppress(UserError, OSError):
                command = read_json(self.folder / "sweep.json", "").get("command")
                if command == sys.argv[1:] and _can_join(self.lock):
                    return True
            if not _is_shared() or time.monotonic() > deadline:
                where = "wait for its end, or choose another hydra.sweep.dir"
                if _is_search():
                    where = f"one process leads a search, and hydra/launcher=slurm or process spreads its jobs; {where}"
                refuse(f"{self.folder} is another process's sweep; {where}.")
            time.sleep(0.1)  # the other process may have begun in this moment
        return False

    def _state(self) -> tuple[int, int]:
        jobs = [RunFolder(path) for path in self.folder.iterdir() if path.is_dir() and path.name[:1] != "."]
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
    """Return the folder of this command's sweep if it was begun, is unfinished and can be joined; else a new one."""
    for record in sorted(Path(root).glob("*/sweep.json"), reverse=True):
        try:
            content = read_json(record, "restore it from a copy to continue this sweep, or remove it")
        except UserError as damage:
            print(damage, file=sys.stderr)
            continue
        if content.get("command") == sys.argv[1:] and not content.get("finished"):
            folder = os.open(record.parent, os.O_RDONLY)
            try:
                if _locks(folder) or _can_join(folder) or _is_search():
                    return str(record.parent)
            finally:
                os.close(folder)
    return new_folder(f"{root}/{datetime.now():%Y-%m-%d_%H-%M-%S}")


def register_resolvers() -> None:
    """Register `${run_folder:<root>,<name>}` and `${sweep_folder:<root>}`, which give all jobs of a sweep the same."""
    before = omegaconf.__version__.startswith("2.3.")  # later versions warn of this name
    register: Any = OmegaConf.register_new_resolver if before else OmegaConf.register_resolver
    register("run_folder", run_folder, replace=True, use_cache=True)
    register("sweep_folder", sweep_folder, replace=True, use_cache=True)


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
    changed = [word for word in varying(overrides) if word in named]
    return os.environ.get("WANDB_JOB_TYPE") or _cut(",".join(changed or named), _LONGEST_TYPE) or None


def swept(overrides: Sequence[str]) -> str:
    """Return what a sweep of Hydra or of W&B varies, without the seed and the choices that every name has.

    A job in its own process reads it from a variable.
    """
    words = [in_short(word) for word in varying(overrides) if word.partition("=")[0] not in ("seed", *_IN_A_NAME)]
    return os.environ.get(_SWEPT) or " ".join(words)


def run_name(choices: Mapping[str, str], overrides: Sequence[str], seed: int) -> str:
    """Return a run's name on dashboards: its choices, what a sweep varies beside them, and the seed."""
    name = " ".join(filter(None, (short_name(choices), swept(overrides))))
    return _cut(name, _LONGEST_NAME - len(f" seed={seed}")) + f" seed={seed}"


def short_name(choices: Mapping[str, str]) -> str:
    """Return the name of runs with these choices of the groups."""
    plain = {group for group in _IF_CHOSEN if choices.get(group, "none") == "none"}
    return "-".join(choices[group] for group in _IN_A_NAME if group not in plain)


def _cut(text: str, longest: int) -> str:
    """Return a text of at most `longest` characters. Different texts stay different."""
    return text if len(text) <= longest else f"{text[: longest - 9]}~{crc32(text.encode()):08x}"


def varying(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that a sweep changes from job to job: those that were not typed in this form.

    In a sweep of W&B, they are those whose values the server has chosen.
    """
    if file := os.environ.get("WANDB_SWEEP_PARAM_PATH"):
        chosen = OmegaConf.load(file)
        return [word for word in overrides if word.partition("=")[0] in chosen]
    typed = {in_short(word) for word in sys.argv[1:]}
    return [word for word in overrides if not typed & {in_short(word), word.removesuffix("=null")}]  # of ~key


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))


def _locks(folder: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(folder, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # another error means a file system without locks
    return True


def _is_shared() -> bool:
    """Return whether other processes may join this command: its jobs are known before the first one runs."""
    return "hydra/launcher=process" in sys.argv[1:] and not _is_search()


def _is_search() -> bool:
    """Return whether a sweeper chooses jobs from the results of earlier ones. One process leads it."""
    return any(word.startswith("hydra/sweeper=") for word in sys.argv[1:])


def _can_join(folder: int) -> bool:
    return _is_shared() and _locks(folder, fcntl.LOCK_SH)
