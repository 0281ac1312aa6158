"""Jobs that launchers of Hydra's plug-ins, such as joblib's and Ray's, take to processes of their own."""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import update_wrapper
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import TaskFunction
from omegaconf import DictConfig

from icl_msr.cli.processes import Child, passed_on
from icl_msr.cli.stopping import Stop
from icl_msr.cli.sweeps import Job, execute, register_resolvers, varying
from icl_msr.core import trust
from icl_msr.core.errors import PREEMPTED, UserError
from icl_msr.core.folder import RunFolder


class Task:
    """The function that Hydra calls for each job of a command. In a process of another launcher, it is `Elsewhere`.

    Such a launcher pickles the function. The program's own launchers call it in the process of the command.
    """

    def __init__(self, here: TaskFunction):
        self.here = here
        update_wrapper(self, here)

    def __call__(self, config: DictConfig) -> Any:
        """Run the job in this process."""
        return self.here(config)

    def __reduce__(self) -> tuple[type["Elsewhere"], tuple[Any, ...]]:
        return Elsewhere, (sys.argv[1:], os.getcwd(), trust.word())


class Elsewhere:
    """Runs a job as `python -m icl_msr.run` in its own folder, as `hydra/launcher=process` does.

    So the job needs nothing of the process that it came to, and the launcher decides only when and where it runs.
    """

    def __init__(self, command: Sequence[str], directory: str, trusted: Sequence[str]):
        os.chdir(directory)
        sys.argv[1:] = command
        trust.given(trusted)
        register_resolvers()
        self.running: list[Child] = []

    def __call__(self, config: DictConfig) -> float:
        """Run the job that Hydra has set up and return its metric; NaN if it fails or a signal has stopped it."""
        sweep: Any = HydraConfig.instance().cfg
        hydra, metric, end = sweep.hydra, math.nan, "stopped"
        folder = RunFolder(Path(hydra.runtime.output_dir))
        job = Job(hydra.job.num, list(hydra.overrides.task), config, folder, " ".join(varying(hydra.overrides.task)))
        stop = Stop(Path(str(hydra.sweep.dir)))
        with passed_on(self.running) as signals, stop.passed_on(self.running, signals):
            code = PREEMPTED if stop.signal() else execute(sweep, job, self.running, log=True)
        if code == 0:
            with suppress(UserError):
                metric = folder.metric()
            end = f"metric {metric:.4f}"
        elif code != PREEMPTED and not signals:
            end = f"exit code {code}, see {folder.path / 'job.log'}"
        print(f"{job.title or folder}: {end}", flush=True)
        return metric
