"""Trackio."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers.logger import Logger
from typing_extensions import override

from icl_msr.core.ranks import is_first
from icl_msr.core.records import Outcome, dashboard_name
from icl_msr.core.storage import atomic_write
from icl_msr.core.tables import Table
from icl_msr.training.loggers.base import (
    About,
    Picture,
    figures,
    forgiving,
    identity,
    new_identity,
    require_package,
    unless_lost,
)


class Trackio(Logger):
    """Trackio, in the store that its variables name or that it chooses itself. `conf/logger/trackio.yaml` has the keys.

    Training goes on if Trackio cannot write. One line says so, and nothing more is sent.

    Raises:
        UserError: Trackio is not installed.
    """

    product = "Trackio"

    def __init__(self, folder: Path, about: About, *, project: str, artifacts: bool):
        super().__init__()
        require_package("trackio", self.product, "trackio")
        self.folder, self.about, self.project, self.artifacts = folder, about, project, artifacts
        self.run: Any = None
        self.lost = not is_first()
        self._begin()

    @override
    @property
    def name(self) -> str:
        return self.project

    @override
    @property
    def version(self) -> str | None:
        # The run's name, which is its identity for Trackio.
        return None if self.run is None else str(self.run.name)

    @override
    @unless_lost
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # One point of every curve.
        self.run.log({dashboard_name(name): value for name, value in metrics.items()}, step)

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # The config was sent at the start.
        pass

    @unless_lost
    def show(self, pictures: Mapping[str, Picture], step: int | None = None) -> None:
        """Send pictures."""
        import trackio

        shown = {name: trackio.Image(str(file), caption=caption) for name, (file, caption) in pictures.items()}
        self.run.log(shown, step)

    @unless_lost
    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Send distributions of values while the run trains."""
        import trackio

        self.run.log({dashboard_name(name): trackio.Histogram(array) for name, array in values.items()}, step)

    @unless_lost
    def conclude(self, folder: Path) -> None:
        """Send the final numbers, the pictures, the report, the tables and the artifacts of a finished run."""
        import trackio

        outcome = Outcome.load(folder)
        curves = {dashboard_name(name) for name in outcome.final}
        self.run.log({name: value for name, value in outcome.dashboard_numbers().items() if name not in curves})
        self.show(figures(folder))
        for kind, rows in outcome.records.rows().items():
            table = Table.of(kind, rows)
            self.run.log({f"records/{kind}": trackio.Table(columns=list(table.heads), data=table.data)})
        self._keep("report", folder / "report.html", folder / "results.json")
        if self.artifacts:
            self._keep("checkpoint", folder / "checkpoints" / "last.ckpt")
            self._keep("encoder", folder / "encoder.safetensors", folder / "encoder.json")

    def close(self, exit_code: int) -> None:
        """End the run. Trackio does not keep the exit code."""
        if self.run is not None:
            import trackio

            with forgiving(self), _silent():
                trackio.finish()
        self.run, self.lost = None, True

    @unless_lost
    def _begin(self) -> None:
        """Start the run. A continued run keeps its name, which Trackio knows runs by, so that no other run has it."""
        with _silent():
            import trackio

            side_file = self.folder / "trackio_id"
            known = identity(side_file, self.about)
            name = known or f"{self.about.name} {new_identity()}"
            self.run = trackio.init(
                self.project,
                name=name,
                group=self.about.group,
                config={**self.about.config, "job_type": self.about.job_type},
                resume="allow",
                embed=False,
            )
        atomic_write(side_file, name)

    def _keep(self, kind: str, *files: Path) -> None:
        import trackio

        there = [file for file in files if file.exists()]  # a run may keep no checkpoint
        if there:
            artifact = trackio.Artifact(f"{kind}-{self.run.name.split()[-1]}", kind)
            for file in there:
                artifact.add_file(file)
            self.run.log_artifact(artifact, aliases=["last"])


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what Trackio prints."""
    with redirect_stdout(io.StringIO()):
        yield
