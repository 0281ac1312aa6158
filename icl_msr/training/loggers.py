"""Loggers of numbers and pictures: the CSV file that every run writes, and dashboards."""

import csv
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from icl_msr.core import slurm
from icl_msr.core.errors import PREEMPTED, UserError, reason
from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import is_first
from icl_msr.core.records import Outcome, dashboard_name
from icl_msr.core.storage import atomic_write, read_json, readable
from icl_msr.core.tables import Table, csv_text, inert

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

CHECKOUT = Path(__file__).parents[2]
"""The folder of this package's repository, unless the package is installed."""


@dataclass(frozen=True)
class About:
    """The facts about a run that a dashboard shows."""

    name: str
    """The choices of the run, what its sweep varies, and the seed."""
    group: str | None
    """Name of the sweep; None outside a sweep."""
    job_type: str | None
    """The settings without the seed."""
    config: dict[str, Any]
    """The composed config, and the facts `choices`, `derived`, `environment` and `data`."""
    resumed_at: int | None
    """Optimiser steps done when the run was continued; None for a fresh start."""


class Picture(NamedTuple):
    """A picture for a dashboard."""

    file: Path
    caption: str


@runtime_checkable
class Dashboard(Protocol):
    """A logger that also takes pictures and the results of a finished run. Lightning's own take only curves."""

    def show(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Log pictures by name while the run trains. The files may be gone afterwards."""

    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Log the distributions of finite values by name while the run trains."""

    def conclude(self, folder: Path) -> None:
        """Log the results and the pictures of a finished run."""

    def close(self, exit_code: int) -> None:
        """End the run with its exit code."""


class MetricsFile(Logger):
    """Writes `metrics.csv`: one row per call of `log_metrics`, on the disk at once.

    A continued run keeps the rows of the steps before its checkpoint. Lightning's own CSV logger would delete the file
    then, and rewrites it in place for a new column.
    """

    def __init__(self, folder: Path, about: About):
        super().__init__()
        self.file = folder / "metrics.csv"
        self.columns: list[str] = ["epoch", "step"]
        if is_first():
            done = about.resumed_at or 0
            self._write([row for row in self._rows() if "step" in row and float(row["step"]) < done])

    @override
    @property
    def name(self) -> str:
        return ""

    @override
    @property
    def version(self) -> str:
        return ""

    @override
    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # `config.yaml` has them.
        pass

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # One row.
        row = {**{inert(name): value for name, value in metrics.items()}, "step": step}
        if row.keys() - set(self.columns):
            self.columns = ["epoch", "step", *sorted({*self.columns, *row} - {"epoch", "step"})]
            self._write(self._rows())
        with self.file.open("a", newline="") as file:
            file.write(self._text([row]))

    def _rows(self) -> list[dict[str, str]]:
        return RunFolder(self.file.parent).logged()

    def _write(self, rows: list[dict[str, str]]) -> None:
        filled = {name for row in rows for name in row}
        self.columns = ["epoch", "step", *sorted(({*self.columns, *filled}) - {"epoch", "step"})]
        atomic_write(self.file, csv_text([self.columns]) + self._text(rows))

    def _text(self, rows: Any) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n").writerows(rows)
        return text.getvalue()


def figures(folder: Path) -> dict[str, Picture]:
    """Return the pictures in the folder of a run by their names on a dashboard."""
    file = folder / "figures" / "captions.json"
    captions = read_json(file, "remove it") if file.exists() else {}
    return {
        f"pictures/{Path(name).stem}": Picture(folder / "figures" / name, caption) for name, caption in captions.items()
    }


class WeightsAndBiases(Logger):
    """Weights & Biases, in the run's folder, and offline without an account. `conf/logger/wandb.yaml` has the keys.

    Training goes on if W&B cannot write. One line says so, and nothing more is sent.

    Raises:
        UserError: the value of the variable `WANDB_MODE` is not allowed.
    """

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
        self.lost = False
        wanted: str = os.environ.get("WANDB_MODE") or mode
        if wanted not in ("auto", *MODES):
            raise UserError(f"WANDB_MODE={wanted} is not allowed; it should be {', '.join(MODES)} or not be set.")
        if is_first() and wanted != "disabled":
            with self._forgiving():
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
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # One point of every curve.
        if self._listens():
            with self._forgiving():
                named = {dashboard_name(name): value for name, value in metrics.items()}
                self.run.log({**named, STEP: step})

    @override
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # The config was sent at the start.
        pass

    @override
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if checkpoint_callback.monitor:
            self.best = Path(checkpoint_callback.best_model_path)

    def show(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Send pictures while the run trains."""
        if self._listens():
            with self._forgiving():
                self.run.log({**_images(pictures), STEP: step})

    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Send distributions of values while the run trains."""
        if self._listens():
            import wandb

            with self._forgiving():
                found = {
                    dashboard_name(name): wandb.Histogram(np_histogram=np.histogram(array, 64))
                    for name, array in values.items()
                }
                self.run.log({**found, STEP: step})

    def conclude(self, folder: Path) -> None:
        """Send the summary, the pictures, the report, the tables and the artifacts of a finished run."""
        if self._listens():
            with self._forgiving():
                self._conclude(folder)

    def close(self, exit_code: int) -> None:
        """End the W&B run with the exit code. A run that will be continued is marked as preempted."""
        if self.run is not None:
            with self._forgiving():
                # The agent of a sweep ends runs by a signal too, and the server would start them again.
                if exit_code == PREEMPTED and (slurm.job() or "WANDB_SWEEP_ID" not in os.environ):
                    self.run.mark_preempting()
                self.run.finish(exit_code=exit_code)
        self.run = None

    def _listens(self) -> bool:
        return self.run is not None and not self.lost

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.lost:
                print(f"W&B cannot write ({reason(error)}); the run goes on without it.", file=sys.stderr)
            self.lost = True

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
        identity = secrets.token_hex(4)
        if self.about.resumed_at is not None and side_file.exists():
            with readable(side_file, "remove it, and the run has a new id"):
                identity = side_file.read_text().strip()
        silent = wandb.Settings(silent=True)
        ours: dict[str, Any] = {
            **{"project": self.project, "entity": self.entity, "dir": self.folder, "id": identity},
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

    def _conclude(self, folder: Path) -> None:
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


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files, in the run's folder."""

    def __init__(self, folder: Path, about: About):
        try:
            super().__init__(folder, name="tensorboard", version="", purge_step=about.resumed_at)
        except ModuleNotFoundError:
            raise UserError(
                "logger=tensorboard needs tensorboard, which is not installed; type: "
                "pip install 'icl-msr[tensorboard]'."
            ) from None

    @rank_zero_only
    def show(self, pictures: Mapping[str, Picture], step: int | None = None) -> None:
        """Write pictures."""
        from matplotlib.image import imread

        for name, picture in pictures.items():
            self.experiment.add_image(name, imread(picture.file)[..., :3], step, dataformats="HWC")

    @rank_zero_only
    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Write distributions of values."""
        for name, array in values.items():
            self.experiment.add_histogram(name, array, step)

    @rank_zero_only
    def conclude(self, folder: Path) -> None:
        """Write the final numbers and the pictures."""
        for name, value in Outcome.load(folder).dashboard_numbers().items():
            self.experiment.add_scalar(f"final/{name}", value)
        self.show(figures(folder))

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Flush the event file."""
        self.finalize("success" if exit_code == 0 else "failed")
