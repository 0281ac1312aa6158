"""Weights & Biases."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pytorch_lightning.loggers.logger import Logger
from typing_extensions import override

from icl_msr.core import slurm
from icl_msr.core.errors import PREEMPTED, UserError, reason
from icl_msr.core.ranks import is_first
from icl_msr.core.records import Outcome, dashboard_name
from icl_msr.core.storage import atomic_write
from icl_msr.core.tables import Table
from icl_msr.training.loggers.base import About, Picture, figures, forgiving, identity, new_identity, unless_lost

STEP = "trainer/global_step"
"""Name of the horizontal axis of W&B's curves: optimiser steps."""

MODES = ("online", "offline", "disabled")
"""Allowed values of the variable `WANDB_MODE`."""

PATIENCE = 30.0
"""Seconds to wait for W&B's server before the run is kept offline."""

SERVICE_IDLE = "5s"
"""Time after which W&B's service ends when no process uses it."""

VARIABLES = {
    **{"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "dir": "WANDB_DIR", "id": "WANDB_RUN_ID"},
    **{"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE"},
}
"""Arguments of `wandb.init`, and the variables that are used instead of our values if the user has set them."""

CHECKOUT = Path(__file__).parents[3]
"""The folder of this package's repository, unless the package is installed."""


class WeightsAndBiases(Logger):
    """Weights & Biases, in the run's folder, and offline without an account. `conf/logger/wandb.yaml` has the keys.

    Training goes on if W&B cannot write. One line says so, and nothing more is sent.

    Raises:
        UserError: the value of the variable `WANDB_MODE` is not allowed.
    """

    product = "W&B"

    def __init__(
        self,
        folder: Path,
        about: About,
        *,
        project: str,
        entity: str | None,
        mode: Literal["auto", "online", "offline"],
        artifacts: bool,
    ):
        super().__init__()
        self.folder, self.about = folder, about
        self.project, self.entity, self.artifacts = project, entity, artifacts
        self.run: Any = None
        self.best: Path | None = None
        """The checkpoint that a `ModelCheckpoint` of Lightning has found to be the best one."""
        wanted: str = os.environ.get("WANDB_MODE") or mode
        if wanted not in ("auto", *MODES):
            raise UserError(f"WANDB_MODE={wanted} is not allowed; it should be {', '.join(MODES)} or not be set.")
        self.lost = not is_first() or wanted == "disabled"
        self._begin(wanted)

    @override
    @property
    def name(self) -> str:
        return self.project

    @override
    @property
    def version(self) -> str | None:
        # The run's id.
        return None if self.run is None else str(self.run.id)

    @override
    @unless_lost
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # One point of every curve.
        self.run.log({**{dashboard_name(name): value for name, value in metrics.items()}, STEP: step})

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # The config was sent at the start.
        pass

    @override
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if checkpoint_callback.monitor:
            self.best = Path(checkpoint_callback.best_model_path)

    @unless_lost
    def show(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Send pictures while the run trains."""
        self.run.log({**_images(pictures), STEP: step})

    @unless_lost
    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Send distributions of values while the run trains."""
        import wandb

        found = {
            dashboard_name(name): wandb.Histogram(np_histogram=np.histogram(array, 64))
            for name, array in values.items()
        }
        self.run.log({**found, STEP: step})

    def close(self, exit_code: int) -> None:
        """End the W&B run with the exit code. A run that will be continued is marked as preempted."""
        if self.run is not None:
            with forgiving(self):
                # The agent of a sweep ends runs by a signal too, and the server would start them again.
                if exit_code == PREEMPTED and (slurm.job() or "WANDB_SWEEP_ID" not in os.environ):
                    self.run.mark_preempting()
                self.run.finish(exit_code=exit_code)
        self.run = None

    @unless_lost
    def _begin(self, mode: str) -> None:
        """Start the W&B run. A continued run keeps its id."""
        # All files stay in the run's folder, including those that wait for an upload.
        home = self.folder / "wandb"
        home.mkdir(exist_ok=True)
        os.environ |= {"WANDB_DATA_DIR": str(home), "WANDB_CACHE_DIR": str(home / "cache")}
        # W&B's own error reports would wait for a server at the end.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if slurm.job():
            _start_service_apart()
        side_file = self.folder / "wandb_id"
        name = identity(side_file, self.about) or new_identity()
        silent = wandb.Settings(silent=True)
        ours: dict[str, Any] = {
            **{"project": self.project, "entity": self.entity, "dir": self.folder, "id": name},
            **{"name": self.about.name, "group": self.about.group, "job_type": self.about.job_type},
        }
        in_checkout = (CHECKOUT / ".git").exists() and not wandb.env.disable_git()
        begin = partial(
            wandb.init,
            **{key: value for key, value in ours.items() if not os.environ.get(VARIABLES[key])},
            config=self.about.config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=not in_checkout,
                git_root=str(CHECKOUT) if in_checkout else None,
                init_timeout=PATIENCE,
                finish_timeout=60 * PATIENCE,
                finish_timeout_raises=True,
            ),
            reinit="create_new",
        )
        wandb.setup(silent)
        if mode != "offline":
            try:
                if wandb.login(prompt=False, verify=False):  # asks neither the user nor the server
                    self.run = begin(mode="online", resume="allow")
                elif mode == "online":
                    raise PermissionError("nobody is logged in; type wandb login")
            except Exception as error:
                print(
                    f"W&B cannot be reached ({reason(error)}); this run is kept offline. WANDB_MODE=offline avoids "
                    "the wait.",
                    file=sys.stderr,
                )
                wandb.teardown()  # else it would refuse the run's id as taken
                wandb.setup(silent)
        if self.run is None:
            self.run = begin(mode="offline")
        atomic_write(side_file, self.run.id)
        # W&B's service links its log, which lies in the folder of the process's first run. A run's folder holds itself.
        (Path(self.run.dir).parent / "logs" / "debug-core.log").unlink(missing_ok=True)
        if in_checkout:
            self._save_diff()
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)

    def _save_diff(self) -> None:
        """Save what differs from the commit. W&B itself would look for a repository around the run's folder."""
        git = ["git", "-C", str(CHECKOUT), "diff", "HEAD"]
        found = subprocess.run(git, capture_output=True, check=False)
        if found.stdout:
            file = Path(self.run.dir) / "diff.patch"
            file.write_bytes(found.stdout)
            self.run.save(str(file), base_path=self.run.dir, policy="now")

    @unless_lost
    def conclude(self, folder: Path) -> None:
        """Send the summary, the pictures, the report, the tables and the artifacts of a finished run."""
        import wandb

        run = self.run
        outcome = Outcome.load(folder)
        run.summary.update(outcome.dashboard_numbers())
        run.log(_images(figures(folder)))
        if (page := folder / "report.html").exists():
            run.log({"report": wandb.Html(str(page), inject=False)})
        for kind, rows in outcome.records.rows().items():
            table = Table.of(kind, rows)
            run.log(
                {f"records/{kind}": wandb.Table(columns=list(table.heads), data=table.data, allow_mixed_types=True)}
            )
        if self.artifacts:
            self._log_artifacts(folder, outcome)

    def _log_artifacts(self, folder: Path, outcome: Outcome) -> None:
        import wandb

        config = self.about.config
        known = {"metric": outcome.metric, "seed": outcome.seed, "choices": dict(outcome.choices)}
        known |= {key: config.get(key) for key in ("data", "environment")}

        def log(name: str, kind: str, files: Sequence[Path], *aliases: str) -> None:
            there = [file for file in files if file.exists()]  # a run may keep no checkpoint
            if there:
                artifact = wandb.Artifact(f"{name}-{self.run.id}", kind, metadata=known)
                for file in there:
                    artifact.add_file(str(self._keep(file)), name=file.name, policy="immutable")
                self.run.log_artifact(artifact, aliases=list(aliases))

        last = folder / "checkpoints" / "last.ckpt"
        best = self.best if self.best and self.best.exists() and self.best != last else None
        if best:
            log("checkpoint", "model", [best], "best")
        ends = ("last",) if best else ("best", "last")
        log("checkpoint", "model", [last], *ends)
        log("encoder", "encoder", [folder / "encoder.safetensors", folder / "encoder.json"], *ends)
        log("report", "report", [folder / "report.html", folder / "results.json"], "last")
        if data := config.get("data"):
            name = re.sub(r"[^\w.-]", "_", data["name"])
            artifact = wandb.Artifact(f"data-{name}", "dataset", metadata=data)
            with artifact.new_file("data.json") as file:
                json.dump(data, file, indent=2)
            # `use_artifact` refuses an offline run, and waits for the upload of another one.
            self.run._log_artifact(artifact, use_after_commit=True)

    def _keep(self, file: Path) -> Path:
        """Link the current file under a second name. A continued run may replace it before it is uploaded."""
        kept = Path(self.run.dir).parent / "artifacts" / file.name
        kept.parent.mkdir(exist_ok=True)
        try:
            kept.hardlink_to(file)
        except OSError:  # the file system has no hard links
            shutil.copy(file, kept)
        return kept


def _images(pictures: Mapping[str, Picture]) -> dict[str, Any]:
    import wandb

    return {name: wandb.Image(str(file), caption=caption) for name, (file, caption) in pictures.items()}


def _start_service_apart() -> None:
    """Start W&B's service as a process that is not below this one, for `wandb.setup` to find.

    SLURM may send the signal of a step to all processes below its tasks. The service ends at once on a signal, and the
    last points of the curves would be lost.
    """
    if "WANDB_SERVICE" not in os.environ:
        command = [sys.executable, "-m", "wandb", "beta", "core", "start", "--idle-timeout", SERVICE_IDLE]
        started = subprocess.run(command, capture_output=True, text=True, check=False)
        if started.returncode == 0:  # else the service starts below this process, as usual
            os.environ["WANDB_SERVICE"] = started.stdout.strip()
