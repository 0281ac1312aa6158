"""Dashboards of Weights & Biases as code: workspaces and a report, made of the names that a run logs."""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from icl_msr.core.errors import UserError, reason
from icl_msr.core.records import ACCURACY, CHANCE, GAP, Classifier, Measurement
from icl_msr.core.storage import atomic_write
from icl_msr.evaluation.background import GAPS
from icl_msr.evaluation.pictures import PICTURES
from icl_msr.training.loggers import STEP

wr: Any = import_module("wandb_workspaces.reports.v2")
ws: Any = import_module("wandb_workspaces.workspaces")
expr: Any = import_module("wandb_workspaces.expr")

SPLITS = ("original", "mixed_same", "mixed_rand", "only_fg", "only_bg")
"""Test splits of a set with swapped backgrounds."""

_PROBE = Classifier(family="linear")


class Part(NamedTuple):
    """A section of a dashboard."""

    name: str
    about: str
    panels: Callable[[], list[Any]]
    """Makes the panels. Each workspace and the report need their own."""


def _accuracy(fitted_on: str, split: str) -> str:
    known: dict[str, Any] = {"kind": ACCURACY.kind, "classifier": _PROBE, "fitted_on": fitted_on, "split": split}
    return Measurement(value=None, **known).dashboard_name


def _gaps(fitted_on: str) -> list[str]:
    known: dict[str, Any] = {"kind": GAP.kind, "classifier": _PROBE, "fitted_on": fitted_on, "unit": "points"}
    shown = [pair for pair in GAPS if {*pair} <= {*SPLITS, CHANCE}]
    return [Measurement(value=None, split=first, minus=second, **known).dashboard_name for first, second in shown]


def _line(title: str, *names: str, x: str = STEP, **keys: Any) -> Any:
    return wr.LinePlot(title=title, x=x, y=list(names), **keys)


def _bars(title: str, *names: str) -> Any:
    return wr.BarPlot(title=title, metrics=list(names))


def _table(kind: str) -> Any:
    return wr.WeavePanelSummaryTable(table_name=f"records/{kind}", layout=wr.Layout(w=24, h=10))


def _answer() -> list[Any]:
    return [
        _bars("The metric of the run", "metric"),
        _bars("Probe fitted on a balanced split: accuracy", *(_accuracy("balanced", split) for split in SPLITS)),
        _bars("Probe fitted on the training set: accuracy", *(_accuracy("train", split) for split in SPLITS)),
        wr.MediaBrowser(title="The page of the run", media_keys=["report"], layout=wr.Layout(w=24, h=16)),
    ]


def _background() -> list[Any]:
    return [
        _bars("Probe fitted on the training set: gaps, points", *_gaps("train")),
        _bars("Probe fitted on a balanced split: gaps, points", *_gaps("balanced")),
        _table(ACCURACY.kind),
        _table(GAP.kind),
    ]


def _training() -> list[Any]:
    return [
        _line("Loss", "loss", "loss/contrastive"),
        _line("Accuracy on held-out training images", "online/knn", "online/probe"),
        _line("Learning rate", "lr"),
        _line("Spread of the embeddings: 1 fills the sphere, 0 is collapsed", "embedding_std"),
    ]


def _msr() -> list[Any]:
    return [
        _line("Loss of the regularizer", "loss/msr"),
        _line("Norms of both parts of the meta gradient", "msr/meta_grad_norm", "msr/uniformity_grad_norm", log_y=True),
        _line("Uniformity loss", "msr/uniformity"),
        _line("Diversity of the strata", "msr/entropy", "msr/overlap", "msr/variation"),
        _line("Step size of the inner step", "msr/alpha"),
        _table("strata"),
    ]


def _negatives() -> list[Any]:
    kinds = ("positive", "own", "hardest", "others")
    return [_line("Cosine of an anchor to its", *(f"negatives/similarity_{kind}" for kind in kinds))]


def _pictures() -> list[Any]:
    names = [Path(file).stem for file in PICTURES]
    return [wr.MediaBrowser(title=name, media_keys=[f"pictures/{name}"]) for name in names]


def _system() -> list[Any]:
    time = "RelativeTime(Process)"
    return [
        _line("Speed, images per second", "images_per_second"),
        _bars("Peak memory of the training device, MB", "peak_memory_mb"),
        _bars("Wall time, seconds", "wall_time_s"),
        _line("Memory of the process, MB", "system/proc.memory.rssMB", x=time),
        _line("Memory of the machine in use, %", "system/memory_percent", x=time),
        wr.LinePlot(title="Use of the GPUs, %", x=time, metric_regex=r"system/gpu\.\d+\.(gpu|memory)$"),
    ]


PARTS = (
    Part("Answer", "How much of the object is in the features, and how much does the background decide?", _answer),
    Part(
        "Background", "Differences of accuracies when the background is swapped or the object is missing.", _background
    ),
    Part("Training", "The loss, and what the encoder knows on held-out training images.", _training),
    Part("MSR", "The meta semantic regularizer. The panels stay empty for runs without it.", _msr),
    Part("Negatives", "How near an anchor's key and its negatives are to it.", _negatives),
    Part("Pictures", "What the method compares, what the strata look at, and what the encoder finds alike.", _pictures),
    Part("System", "Speed, memory and time.", _system),
)


def build(project: str, entity: str) -> dict[str, Any]:
    """Return the workspaces and the report by file name. They are the same whenever they are built."""
    with _same_ids():
        return {
            "workspace-run": _workspace(project, entity, "icl-msr: one run", [], ws.RunsetSettings()),
            "workspace-sweep": _workspace(project, entity, "icl-msr: sweep", _compared(), _by_settings()),
            "report": _report(project, entity),
        }


def write(boards: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write dashboards as JSON files into a folder, and return their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({reason(error)}); give another folder, --to FOLDER.") from None
    files = {folder / f"{name}.json": board for name, board in boards.items()}
    for file, board in files.items():
        spec = board._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        atomic_write(file, json.dumps(spec, indent=2) + "\n")
    return list(files)


def save(boards: Iterable[Any]) -> None:
    """Save dashboards in their project, as new ones, if somebody is logged in, and print where.

    Raises:
        UserError: the server cannot be reached.
    """
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        if os.environ.get("WANDB_MODE") in ("offline", "disabled") or not wandb.login(prompt=False, verify=False):
            print(
                "Nobody is logged in to W&B, so nothing is saved there; wandb login, and the same command saves them."
            )
            return
        for board in boards:
            board.entity = board.entity or wandb.Api().default_entity
            print(board.save().url)
    except Exception as error:
        raise UserError(
            f"W&B cannot save the dashboards ({reason(error)}); the files are written; repeat the command."
        ) from None


@contextmanager
def _same_ids() -> Iterator[None]:
    """Let panels that are made in the context have the same ids each time. The library draws them at random."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _workspace(project: str, entity: str, name: str, more: list[Any], runs: Any) -> Any:
    sections = [ws.Section(name=part.name, panels=part.panels(), is_open=True) for part in PARTS]
    sections[0].panels = [*more, *sections[0].panels]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    keys = {"project": project, "entity": entity, "name": name, "sections": sections}
    return ws.Workspace(**keys, settings=settings, runset_settings=runs)


def _compared() -> list[Any]:
    """Return panels that tell the runs of a sweep apart."""
    return [wr.ParameterImportancePlot(with_respect_to="metric"), wr.RunComparer(diff_only="split")]


def _by_settings() -> Any:
    """Return the list of runs of a sweep. The job type holds the settings without the seed."""
    shown = ("metric", _accuracy("balanced", "mixed_rand"), *_gaps("train")[:1], "wall_time_s")
    return ws.RunsetSettings(
        groupby=[expr.Metric("Group"), expr.Metric("JobType")],
        order=[expr.Ordering(expr.Summary("metric"), ascending=False)],
        pinned_columns=["run:displayName", *(f"summary:{name}" for name in shown)],
    )


def _report(project: str, entity: str) -> Any:
    blocks: list[Any] = [wr.TableOfContents()]
    for part in PARTS:
        runs = wr.Runset(name="Runs by settings", groupby=["Group", "JobType"])
        blocks += [wr.H2(part.name), wr.P(part.about), wr.PanelGrid(runsets=[runs], panels=part.panels())]
    return wr.Report(
        project=project,
        entity=entity,
        title="Does the encoder look at the object or at the background?",
        description="Runs of icl-msr, grouped by their settings; the seeds of a group are averaged.",
        blocks=blocks,
        width="fluid",
    )
