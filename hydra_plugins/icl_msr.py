"""`hydra/launcher=serial` and `process`, here because Hydra takes launchers from this package alone."""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher


class SerialLauncher(BasicLauncher):
    """Hydra's own: one job after the other in this process, once all are known to be without mistakes."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """See Hydra's Launcher."""
        from icl_msr.cli import sweeps

        assert self.hydra_context is not None
        assert self.config is not None
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            sweeps.checked_job(self.hydra_context, self.config, overrides, number)
        jobs = [sweeps.job_words(self.config, overrides) for overrides in job_overrides]
        return super().launch(jobs, initial_job_idx)


class ProcessLauncher(Launcher):
    """See `icl_msr.cli.sweeps.ProcessLauncher`. Imported late: every program that uses Hydra reads this file."""

    def __init__(self, **keys: Any):
        self.keys = keys

    def setup(self, **given: Any) -> None:
        """See Hydra's Launcher."""
        from icl_msr.cli import sweeps

        self.launcher = sweeps.ProcessLauncher(**self.keys)
        self.launcher.setup(**given)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """See Hydra's Launcher."""
        return self.launcher.launch(job_overrides, initial_job_idx)
