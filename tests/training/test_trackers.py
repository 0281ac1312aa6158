"""What a run leaves for MLflow and Trackio, read back from their stores with their own libraries."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from support.tiny import DATA, MODEL
from support.written import write_run

from icl_msr.core.errors import UserError
from icl_msr.core.records import Outcome
from icl_msr.training.loggers import About, MLflow, Trackio, figures

CONFIG = {"seed": 0, "method": {"temperature": 0.2}, "environment": {"commit": "c0ffee"}, "choices": {"method": "moco"}}
FRESH = About(name="moco-msr seed=0", group="a-sweep", job_type="regularizer=msr", config=CONFIG, resumed_at=None)
CONTINUED = About(name=FRESH.name, group=FRESH.group, job_type=FRESH.job_type, config=CONFIG, resumed_at=2)
Curves = dict[str, list[tuple[int, float]]]


@dataclass
class Kept:
    """A run as its store has it."""

    name: str
    group: str | None
    config: Mapping[str, Any]
    curves: Curves
    numbers: Mapping[str, float]
    """The latest values."""
    pictures: set[str]
    files: set[str]
    status: str | None = None


def mlflow_runs(project: str = "icl-msr") -> list[Kept]:
    """Return the runs of an experiment, oldest first."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    found = []
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
        known = run.info.run_id
        history = {name: client.get_metric_history(known, name) for name in run.data.metrics}
        shown = {file.path for file in client.list_artifacts(known, "images")}
        found.append(
            Kept(
                name=str(run.info.run_name),
                group=run.data.tags.get("group"),
                config=run.data.params,
                curves={name: [(point.step, point.value) for point in points] for name, points in history.items()},
                numbers=run.data.metrics,
                pictures={Path(file).name.partition("+")[0].replace("~", "/") for file in shown},
                files={Path(file.path).name for file in client.list_artifacts(known)},
                status=run.info.status,
            )
        )
    return found


def trackio_runs(project: str = "icl-msr") -> list[Kept]:
    """Return the runs of a project, oldest first."""
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for record in SQLiteStorage.get_run_records(project):
        name, known_as = str(record["name"]), record["id"]
        rows = SQLiteStorage.get_logs(project, name, run_id=known_as)
        curves: Curves = {}
        for row in rows:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "step":
                    curves.setdefault(key, []).append((row["step"], value))
        kinds = [(key, value["_type"]) for row in rows for key, value in row.items() if isinstance(value, dict)]
        known = SQLiteStorage.get_run_config(project, name) or {}
        artifacts = SQLiteStorage.get_run_artifacts(project, name, known_as)
        found.append(
            Kept(
                name=name.rpartition(" ")[0],
                group=known["_Group"],
                config=known,
                curves=curves,
                numbers={key: points[-1][1] for key, points in curves.items()},
                pictures={key for key, kind in kinds if kind == "trackio.image"},
                files={one["name"].partition("-")[0] for one in artifacts["output"]},
            )
        )
    return found


@dataclass
class Tracker:
    """One of the products, and how its store is read."""

    product: type[MLflow | Trackio]
    runs: Callable[..., list[Kept]]

    def make(self, folder: Path, about: About = FRESH, **changes: Any) -> MLflow | Trackio:
        folder.mkdir(exist_ok=True)
        return self.product(folder, about, **{"project": "icl-msr", "artifacts": True, **changes})


@pytest.fixture(params=["mlflow", "trackio"])
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A product with an empty store."""
    pytest.importorskip(request.param)
    if request.param == "mlflow":
        in_files(tmp_path / "store", monkeypatch)
        return Tracker(MLflow, mlflow_runs)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    forget_trackio()
    return Tracker(Trackio, trackio_runs)


def in_files(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow write files, which is faster than the tables that it makes at first."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{store}")


def forget_trackio() -> None:
    """Let Trackio read its variables anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]


def test_a_run_is_read_back(tracker: Tracker, tmp_path: Path) -> None:
    done = write_run(tmp_path / "done")
    logger = tracker.make(tmp_path / "run")
    for step in range(3):
        logger.log_metrics({"loss": 2.0 - step, "a - b": 0.5, "epoch": 0}, step)
    logger.histograms({"gradients/a": np.linspace(-1, 1, 100)}, 2)
    logger.show(figures(done), 2)
    logger.conclude(done)
    logger.close(0)
    (kept,) = tracker.runs()
    assert (kept.name, kept.group) == (FRESH.name, "a-sweep")
    assert kept.curves["loss"] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert kept.curves["a_minus_b"] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    outcome = Outcome.load(done)
    final = {name: value for name, value in outcome.dashboard_numbers().items() if name not in outcome.final}
    assert final
    assert {name: kept.numbers[name] for name in final} == pytest.approx(final)
    assert kept.pictures == set(figures(done)) != set()


def test_the_config_is_kept(tracker: Tracker, tmp_path: Path) -> None:
    logger = tracker.make(tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, 0)  # Trackio knows no run without a number
    logger.close(0)
    (kept,) = tracker.runs()
    if tracker.product is MLflow:
        assert kept.config == {
            "seed": "0", "method.temperature": "0.2", "environment.commit": "c0ffee", "choices.method": "moco",
        }  # fmt: skip
    else:
        assert {key: kept.config[key] for key in CONFIG} == CONFIG
        assert kept.config["job_type"] == "regularizer=msr"


def test_mlflow_takes_long_and_many_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_files(tmp_path / "store", monkeypatch)
    many = {**{f"k{i}": i for i in range(250)}, "long": "x" * 7000}
    tracker = Tracker(MLflow, mlflow_runs)
    tracker.make(tmp_path / "run", About(**{**vars(FRESH), "config": many})).close(0)
    (kept,) = tracker.runs()
    assert kept.config == {**{f"k{i}": str(i) for i in range(250)}, "long": "x" * 6000}


@pytest.mark.parametrize("artifacts", [True, False])
def test_files_are_kept(tracker: Tracker, artifacts: bool, tmp_path: Path) -> None:
    done = write_run(tmp_path / "done")
    large = ("checkpoints/last.ckpt", "encoder.safetensors", "encoder.json")
    (done / "checkpoints").mkdir()
    for name in (*large, "report.html"):
        (done / name).write_text("some text")
    logger = tracker.make(tmp_path / "run", artifacts=artifacts)
    logger.conclude(done)
    logger.close(0)
    (kept,) = tracker.runs()
    if tracker.product is MLflow:
        more = {Path(name).name for name in large} if artifacts else set()
        assert kept.files == {"report.html", "results.json", "config.yaml", "pictures"} | more
    else:
        assert kept.files == {"report", *(("checkpoint", "encoder") if artifacts else ())}


def test_a_continued_run_stays_one_run(tracker: Tracker, tmp_path: Path) -> None:
    first = tracker.make(tmp_path / "run")
    first.log_metrics({"loss": 1.0}, 0)
    first.close(75)
    (kept,) = tracker.runs()
    assert kept.status in ("KILLED", None)
    again = tracker.make(tmp_path / "run", CONTINUED)
    again.log_metrics({"loss": 0.5}, 2)
    again.close(1)
    (kept,) = tracker.runs()
    assert kept.curves["loss"] == [(0, 1.0), (2, 0.5)]
    assert kept.status in ("FAILED", None)
    anew = tracker.make(tmp_path / "run")
    anew.log_metrics({"loss": 1.0}, 0)
    anew.close(0)
    assert [kept.status for kept in tracker.runs()] in (["FAILED", "FINISHED"], [None, None])


def test_nothing_is_printed(tracker: Tracker, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = tracker.make(tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.close(0)
    assert capfd.readouterr() == ("", "")


def test_training_goes_on_where_it_cannot_write(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("No space left.\nTwice.")

    logger = tracker.make(tmp_path / "run")
    target, name = (logger.client, "log_batch") if isinstance(logger, MLflow) else (logger.run, "log")
    with monkeypatch.context() as broken:
        broken.setattr(target, name, fails)
        logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"loss": 2.0}, 1)
    logger.conclude(tmp_path / "nowhere")
    logger.close(0)
    said = f"{tracker.product.product} cannot write (No space left); the run goes on without it.\n"
    assert capsys.readouterr().err == said
    assert all("loss" not in kept.curves for kept in tracker.runs())


def test_only_the_first_rank_writes(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = write_run(tmp_path / "done")
    logger = tracker.make(tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.show(figures(done), 0)
    logger.histograms({"gradients/a": np.ones(3)}, 0)
    logger.conclude(done)
    logger.close(0)
    assert logger.version is None
    assert not list((tmp_path / "run").iterdir())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("product", "package"), [(MLflow, "mlflow"), (Trackio, "trackio")])
def test_one_that_is_not_installed(
    product: type[MLflow | Trackio], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"^logger={package} needs {product.product}, which.*pip install 'icl-msr\[{package}\]'\.$"
    with pytest.raises(UserError, match=said):
        product(tmp_path, FRESH, project="p", artifacts=False)


@pytest.mark.slow
def test_a_sweep_of_all_at_once_in_their_own_stores(tmp_path: Path) -> None:
    """Two jobs at a time make MLflow's tables together, and W&B, TensorBoard and Trackio stand beside it."""
    try:
        import trackio  # noqa: F401

        more = ",trackio"
    except ModuleNotFoundError:
        more = ""
    words = [*DATA, *MODEL, "regularizer=none", "evaluation=light", "seed=0,1", "hydra.sweep.dir=sweep"]
    words += ["trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
    words += ["callbacks=[default,pictures,gradients]", "callbacks.pictures.every_n_epochs=1"]
    words += ["callbacks.gradients.every_n_steps=1", f"logger=[wandb,tensorboard,mlflow{more}]"]
    words += ["hydra/launcher=process", "hydra.launcher.jobs=2"]
    ours = {name: value for name, value in os.environ.items() if name.partition("_")[0] not in ("MLFLOW", "TRACKIO")}
    ours |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "icl_msr.run", "-m", *words]
    done = subprocess.run(line, cwd=tmp_path, env=ours, capture_output=True, text=True, check=False, timeout=500)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    read = f"""
import json, sys
sys.path[:0] = {sys.path!r}
from training.test_trackers import mlflow_runs, trackio_runs
runs = mlflow_runs() {"+ trackio_runs()" if more else ""}
print(json.dumps([vars(run) | {{"pictures": sorted(run.pictures), "files": sorted(run.files)}} for run in runs]))
"""
    back = subprocess.run(
        [sys.executable, "-c", read], cwd=tmp_path, env=ours, capture_output=True, text=True, check=True
    )
    runs = [Kept(**run) for run in json.loads(back.stdout.splitlines()[-1])]
    names = [f"moco-none-none-confounded-tiny seed={i}" for i in range(2)]
    assert sorted(run.name for run in runs) == sorted(names * (2 if more else 1))
    for run in runs:
        results = Outcome.load(tmp_path / "sweep" / run.name[-1])
        assert run.group == "sweep"
        assert run.numbers["metric"] == pytest.approx(results.metric["value"])
        assert [step for step, _ in run.curves["loss"]] == [0, 1, 2]
        assert "pictures/views" in run.pictures
