"""MLflow."""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers.logger import Logger
from typing_extensions import override

from icl_msr.core.errors import PREEMPTED
from icl_msr.core.ranks import is_first
from icl_msr.core.records import Outcome, dashboard_name
from icl_msr.core.saved import flatten
from icl_msr.core.storage import atomic_write
from icl_msr.training.loggers.base import About, Picture, figures, forgiving, identity, require_package, unless_lost

LONGEST = 6000
"""Characters of a parameter that MLflow keeps."""

TOGETHER = 100
"""Parameters that MLflow takes at a time."""

ENDS = {0: "FINISHED", PREEMPTED: "KILLED"}
"""MLflow's words for exit codes; all others are `FAILED`."""


class MLflow(Logger):
    """MLflow, in the store that its variables name or that it chooses itself. `conf/logger/mlflow.yaml` has the keys.

    Training goes on if MLflow cannot write. One line says so, and nothing more is sent.

    Raises:
        UserError: MLflow is not installed.
    """

    product = "MLflow"

    def __init__(self, folder: Path, about: About, *, project: str, artifacts: bool):
        super().__init__()
        require_package("mlflow", self.product, "mlflow")
        self.folder, self.about, self.artifacts = folder, about, artifacts
        self.project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or project
        self.run = ""
        """The run's id; empty without a run."""
        self.lost = not is_first()
        self._begin()

    @override
    @property
    def name(self) -> str:
        return self.project

    @override
    @property
    def version(self) -> str | None:
        return self.run or None

    @override
    @unless_lost
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # One point of every curve.
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [Metric(dashboard_name(name), float(value), now, step or 0) for name, value in metrics.items()]
        self.client.log_batch(self.run, points)

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # The config was sent at the start.
        pass

    @unless_lost
    def show(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Send pictures while the run trains."""
        for name, picture in pictures.items():
            with Image.open(picture.file) as image:
                self.client.log_image(self.run, image, key=name, step=step)

    @unless_lost
    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Send distributions of values as one JSON file, because MLflow has no histograms."""
        found = {name: np.histogram(array, 64) for name, array in values.items()}
        content = {
            name: {"counts": counts.tolist(), "edges": edges.tolist()} for name, (counts, edges) in found.items()
        }
        self.client.log_dict(self.run, content, f"histograms/{step}.json")

    @unless_lost
    def conclude(self, folder: Path) -> None:
        """Send the final numbers, the pictures, the report and the artifacts of a finished run."""
        outcome = Outcome.load(folder)
        curves = {dashboard_name(name) for name in outcome.final}
        self.log_metrics({name: value for name, value in outcome.dashboard_numbers().items() if name not in curves})
        kept = [folder / "report.html", folder / "results.json", folder / "config.yaml"]
        if self.artifacts:
            kept += [folder / "checkpoints" / "last.ckpt", folder / "encoder.safetensors", folder / "encoder.json"]
        for file in filter(Path.exists, kept):
            self.client.log_artifact(self.run, str(file))
        for picture in figures(folder).values():
            self.client.log_artifact(self.run, str(picture.file), "pictures")

    def close(self, exit_code: int) -> None:
        """End the MLflow run. One that will be continued is called killed until then."""
        if self.run:
            with forgiving(self):
                self.client.set_terminated(self.run, ENDS.get(exit_code, "FAILED"))
        self.run, self.lost = "", True

    @unless_lost
    def _begin(self) -> None:
        """Start the MLflow run. A continued run keeps its id."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would write into the home folder, and send
        import mlflow
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # it tells how it makes its tables
        with _alone():
            self.client = mlflow.MlflowClient()
        side_file = self.folder / "mlflow_id"
        if known := identity(side_file, self.about):
            self.client.update_run(known, status="RUNNING")
            self.run = known
            return
        config = self.about.config
        commit = config.get("environment", {}).get("commit")
        facts = {"mlflow.source.git.commit": commit, "group": self.about.group, "job_type": self.about.job_type}
        tags = {name: value for name, value in facts.items() if value}
        experiment = mlflow.set_experiment(self.project).experiment_id
        self.run = self.client.create_run(experiment, tags=tags, run_name=self.about.name).info.run_id
        atomic_write(side_file, self.run)
        parameters = [Param(key, str(value)[:LONGEST]) for key, value in flatten(config).items()]
        for first in range(0, len(parameters), TOGETHER):
            self.client.log_batch(self.run, params=parameters[first : first + TOGETHER])


@contextmanager
def _alone() -> Iterator[None]:
    """Let one process at a time open a store. The first one makes its tables, and MLflow does not wait for it."""
    with (Path(tempfile.gettempdir()) / f"icl-msr-mlflow-{os.getuid()}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
