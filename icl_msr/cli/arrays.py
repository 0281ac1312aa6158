"""Sweeps on SLURM: one array, one readable script, and a command that follows it or comes back later."""

import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from icl_msr.cli import processes
from icl_msr.cli.processes import passed_on
from icl_msr.cli.sweeps import Job, command_words, dashboard_variables, exit_codes, planned
from icl_msr.core.errors import PREEMPTED, UserError
from icl_msr.core.storage import atomic_write, read_json

PAUSE = 3.0
"""Seconds between two questions to SLURM."""

_LATE = 20.0
"""Seconds that a shared file system may need to show the results of a job that has ended."""

_DONE = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "DEADLINE",
    "BOOT_FAIL",
}
"""States of tasks that have ended. One that SLURM runs again is soon PENDING."""


class SlurmLauncher:
    """Submits the jobs of a sweep as an array of SLURM, each as `srun python -m icl_msr.run` in its own folder.

    A finished job is skipped, a job that SLURM still has is followed, and any other one is submitted. `follow=False`
    ends the command after that, and the same command follows later. Nodes and tasks come from `hardware`. Any other key
    is a long option of sbatch. `setup` has lines of shell that come before the program.
    """

    def __init__(self, *, follow: bool, at_once: int | None, setup: str | None, **resources: Any):
        self.follow, self.at_once, self.preparation, self.resources = follow, at_once, setup, resources

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives a launcher. `hydra_plugins` registers this class as one.

        Raises:
            UserError: this machine does not have SLURM, or a key is wrong.
        """
        if not shutil.which("sbatch"):
            raise UserError(
                "hydra/launcher=slurm needs sbatch, which is not on this machine; type hydra/launcher=process."
            )
        if self.at_once is not None and (not isinstance(self.at_once, int) or self.at_once < 1):
            raise UserError(
                f"hydra.launcher.at_once={self.at_once} is not allowed; it should be a whole number or null."
            )
        self.context, self.config = hydra_context, config
        self.folder = Path(str(config.hydra.sweep.dir)).absolute()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit what is missing, wait for it unless `follow` is false, and return the metrics to the sweeper."""
        jobs = planned(self.context, self.config, job_overrides, initial_job_idx)
        missing = [job for job in jobs if job.metric() is None]
        for job in jobs:
            if job not in missing:
                print(f"{job.title}: done before, {job.folder}", flush=True)
        arrays = self._submitted()
        there = {number for array in arrays for number in _states(array)[0]}
        if new := [job for job in missing if job.number not in there]:
            arrays = [*arrays, self._submit(new)]
            atomic_write(self.folder / "slurm.json", json.dumps({"arrays": arrays}) + "\n")
        if missing and not self.follow:
            exit_codes.append(0)  # as far as this command can know
            print(f"SLURM has the jobs as {_named(arrays)}; the same command, with follow=true, waits for them.")
            return [job.answer(math.nan if (metric := job.metric()) is None else metric) for job in jobs]
        metrics = self._followed(missing, arrays)
        return [job.answer(metrics.get(job.number, math.nan)) for job in jobs]

    def _submitted(self) -> list[str]:
        """Return the arrays of this sweep that SLURM has not ended yet."""
        file = self.folder / "slurm.json"
        arrays = read_json(file, "remove it")["arrays"] if file.exists() else []
        return [array for array in map(str, arrays) if _states(array)[0]]

    def _submit(self, jobs: Sequence[Job]) -> str:
        file = self.folder / f"array-{jobs[0].number}.sh"
        atomic_write(file, self.script(jobs))
        done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split()).rstrip(".")
            raise UserError(f"SLURM does not take {file} ({said}); change the keys of hydra.launcher.")
        array = done.stdout.strip().partition(";")[0]
        print(f"Submitted {len(jobs)} jobs as SLURM job {array}; its script is {file}.", flush=True)
        return array

    def script(self, jobs: Sequence[Job]) -> str:
        """Return the batch script of some jobs. Whoever reads it sees what each task does.

        Raises:
            UserError: the jobs need different numbers of nodes or devices.
        """
        shapes = {(int(job.config.hardware.nodes), int(job.config.hardware.devices)) for job in jobs}
        if len(shapes) > 1:
            raise UserError(
                "The tasks of an array of SLURM have the same size, and these jobs have several values of hardware; "
                "type a command for each."
            )
        ((nodes, devices),) = shapes
        room = f"%{self.at_once}" if self.at_once else ""
        options = {
            "job_name": self.folder.name,
            "array": ",".join(str(job.number) for job in jobs) + room,
            "nodes": nodes,
            "ntasks_per_node": devices,
            "requeue": True,
            "output": "/dev/null",  # the script chooses a file
            **self.resources,
        }
        lines = ["#!/bin/bash", *_options(options)]
        lines += ["", "case $SLURM_ARRAY_TASK_ID in"]
        for job in jobs:
            folder, words = str(job.folder.path.absolute()), " ".join(map(shlex.quote, command_words(self.config, job)))
            variables = [
                f"{name}={shlex.quote(value)}" for name, value in dashboard_variables(self.config, job).items()
            ]
            export = f"export {' '.join(variables)}; " if variables else ""
            lines.append(f"{job.number}) {export}folder={shlex.quote(folder)}; set -- {words} ;;")
        lines += ["esac", 'exec >>"$folder/job.log" 2>&1', *([self.preparation] if self.preparation else [])]
        cpus = f" --cpus-per-task={self.resources['cpus_per_task']}" if self.resources.get("cpus_per_task") else ""
        lines += [f'srun --kill-on-bad-exit=1{cpus} {shlex.quote(sys.executable)} -m {processes.MODULE} "$@"']
        return "\n".join(lines) + "\n"

    def _followed(self, jobs: Sequence[Job], arrays: Sequence[str]) -> dict[int, float]:
        """Wait for jobs, print their ends, and return the metrics of those that have succeeded by number.

        A signal ends the waiting. The jobs go on.
        """
        metrics: dict[int, float] = {}
        waiting, before = list(jobs), set[int]()
        began: dict[int, float] = {}
        with passed_on([]) as signals:
            while waiting and not signals:
                active, ended = _states(*arrays)
                for job in [job for job in waiting if job.number in active and job.number not in began]:
                    if active[job.number] == "RUNNING":
                        began[job.number] = time.monotonic()
                        print(f"{job.title}: {job.folder}", flush=True)
                # SLURM may run a task again that has just ended, so look twice.
                over = {job.number for job in waiting if job.number not in active}
                for job in [job for job in waiting if job.number in over & before]:
                    waiting.remove(job)
                    self._conclude(job, ended.get(job.number, "gone"), metrics)
                before = over
                if waiting and not signals:
                    time.sleep(PAUSE)
        if waiting:
            print(
                f"The jobs go on as {_named(arrays)}; the same command follows them again, and scancel ends them.",
                file=sys.stderr,
            )
            sys.exit(PREEMPTED)
        return metrics

    def _conclude(self, job: Job, state: str, metrics: dict[int, float]) -> None:
        deadline = time.monotonic() + _LATE
        while (metric := job.metric()) is None and state == "COMPLETED" and time.monotonic() < deadline:
            time.sleep(1)
        exit_codes.append(0 if metric is not None else 1)
        if metric is None:
            print(f"{job.title}: {state}, see {job.folder.path / 'job.log'}", flush=True)
        else:
            metrics[job.number] = metric
            print(f"{job.title}: metric {metric:.4f}", flush=True)


def _states(*arrays: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return the states of the tasks that wait or run, and of those that have ended, by their numbers.

    Raises:
        UserError: SLURM does not answer for minutes.
    """
    active: dict[int, str] = {}
    ended: dict[int, str] = {}
    for line in _squeue(arrays).splitlines() if arrays else []:
        number, _, state = line.strip().partition(" ")
        if number.isdecimal():
            (ended if state.strip() in _DONE else active)[int(number)] = state.strip()
    return active, {number: state for number, state in ended.items() if number not in active}


def _squeue(arrays: Sequence[str]) -> str:
    """Return a line `<task> <state>` for each task of some arrays that SLURM still knows."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}", "--format=%K %T"]
    said = ""
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = " ".join(done.stderr.split())
        if done.returncode == 0 or "Invalid job id" in said:  # SLURM forgets jobs that ended minutes ago
            return done.stdout
        time.sleep(PAUSE)  # the controller may be busy or restarting
    raise UserError(f"SLURM does not answer ({said.rstrip('.')}); the jobs go on, and the same command follows them.")


def _options(options: Mapping[str, Any]) -> list[str]:
    """Return `#SBATCH` lines. A null leaves an option out, and true is an option without a value."""
    return [
        f"#SBATCH --{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in options.items()
        if value is not None and value is not False
    ]


def _named(arrays: Sequence[str]) -> str:
    return f"SLURM job{'s' * (len(arrays) > 1)} {', '.join(arrays)}"
