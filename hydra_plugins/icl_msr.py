"""The launchers `hydra/launcher=serial`, `process`, `slurm` and the sweeper `hydra/sweeper=optuna`.

Hydra finds launchers and sweepers only in `hydra_plugins`.
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf


class SerialLauncher(BasicLauncher):
    """Hydra's basic launcher, which runs the jobs in this process one after the other. It checks all jobs first."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Check the configs of all jobs, then run the jobs."""
        from icl_msr.cli import sweeps

        assert self.hydra_context is not None
        assert self.config is not None
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            sweeps.checked_job(self.hydra_context, self.config, overrides, number)
        jobs = [sweeps.job_words(self.config, overrides) for overrides in job_overrides]
        return super().launch(jobs, initial_job_idx)


class _Late:
    """A plug-in whose class is imported when it is used, because every program that uses Hydra imports this file."""

    named: str

    def __init__(self, **keys: Any):
        self.keys: Any = OmegaConf.to_container(OmegaConf.create(keys), resolve=True)

    def setup(self, **given: Any) -> None:
        """Make the plug-in and pass on what Hydra gives."""
        self.made = resolve_name(self.named)(**self.keys)
        self.made.setup(**given)


class _LateLauncher(_Late, Launcher):
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs and return their metrics."""
        answers: list[JobReturn] = self.made.launch(job_overrides, initial_job_idx)
        return answers


class ProcessLauncher(_LateLauncher):
    """Runs each job in its own process."""

    named = "icl_msr.cli.sweeps.ProcessLauncher"


class SlurmLauncher(_LateLauncher):
    """Submits the jobs to SLURM as an array."""

    named = "icl_msr.cli.arrays.SlurmLauncher"


class OptunaSweeper(_Late, Sweeper):
    """Lets Optuna choose the jobs."""

    named = "icl_msr.cli.search.OptunaSweeper"

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials and return the best values."""
        return self.made.sweep(arguments)
