"""What a run leaves for W&B, for TensorBoard and in metrics.csv, read back from the files themselves."""

import csv
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import wandb
from matplotlib.image import imread
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from support.inprocess import TRAINER, WORDS, Finished, finish
from support.uploads import Sent, sent
from support.written import write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from icl_msr.cli import job as program
from icl_msr.cli.job import closing
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.records import Outcome, Records
from icl_msr.evaluation.pictures import PICTURES
from icl_msr.report.__main__ import main as report
from icl_msr.training import loggers
from icl_msr.training.loggers import STEP, About, MetricsFile, TensorBoard, WeightsAndBiases

FRESH = About(name="a-run", group=None, job_type=None, config={"seed": 0}, resumed_at=None)


def about(**changes: Any) -> About:
    return About(**{**vars(FRESH), **changes})


def table(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module", autouse=True)
def nothing_is_uploaded() -> Iterator[None]:
    """Whoever runs the tests may be logged in."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        yield
        wandb.teardown()
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]  # the logger's own


@dataclass
class Story:
    """A sweep of two jobs, of which the second was refused after its training; then the first had another epoch."""

    sweep: Finished
    folder: Path
    rows: list[dict[str, str]]
    results: dict[str, Any]
    first: Sent
    refused: Sent
    continued: Sent
    identities: list[str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("wandb")
    evaluate = program.evaluate

    def strict(settings: Any, *rest: Any) -> Any:
        if settings.regularizer["lam"] == 0.5:
            raise UserError("lam=0.5 is bad luck; take another.")
        return evaluate(settings, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "evaluate", strict)
        sweep = finish(folder, "-m", "logger=wandb", "trainer.max_epochs=1", "regularizer.lam=1.0,0.5", code=2)
    job = sweep.folder / "0"
    (first,) = sent(job)
    (refused,) = sent(sweep.folder / "1")
    before = [(job / "wandb_id").read_text()]
    kept = {"rows": table(job / "metrics.csv"), "results": json.loads((job / "results.json").read_text())}
    finish(folder, "logger=wandb", "regularizer.lam=1.0", f"hydra.run.dir={job}")  # two epochs
    _, continued = sent(job)
    return Story(
        sweep,
        job,
        **kept,
        first=first,
        refused=refused,
        continued=continued,
        identities=[*before, (job / "wandb_id").read_text()],
    )


# W&B: a sweep and what became of it


def test_the_config_is_nested_as_composed(story: Story) -> None:
    saved = OmegaConf.to_container(OmegaConf.load(story.folder / "config.yaml"), resolve=True)
    assert isinstance(saved, dict)
    saved["trainer"]["max_epochs"] = 1  # of the time before it was continued
    assert {key: story.first.config[key] for key in saved} == saved
    assert story.continued.config["trainer"]["max_epochs"] == 2


def test_the_config_has_the_facts_that_runs_are_compared_by(story: Story) -> None:
    config, results = story.first.config, story.results
    assert config["choices"] == results["choices"]
    ours = {"ranks": 1, "batch_per_rank": 8, "parameters": results["parameters"]}
    trained = config["derived"].pop("trained_parameters")
    assert config["derived"] == results["derived"] | ours
    assert trained > results["parameters"]  # the projector is trained too
    saved = json.loads((story.folder / "environment.json").read_text())
    assert {"commit", "torch", "hardware", "command", "config_hash"} <= config["environment"].keys()
    assert all(saved[key] == value for key, value in config["environment"].items())
    assert config["data"] == {**saved["data"], "name": "confounded", "classes": 10}
    assert set(config) == {
        *OmegaConf.load(story.folder / "config.yaml"),
        *("choices", "derived", "environment", "data", "_wandb"),
    }


def test_names_have_neither_blanks_nor_hyphens(story: Story) -> None:
    logged = {name for row in story.first.history for name in row} | set(story.first.summary)
    assert "knn_dino/balanced/mixed_same_minus_mixed_rand_points" in logged
    assert all(re.fullmatch(r"\w+(/\w+)*", name) for name in logged)


def test_curves_are_drawn_over_the_global_step(story: Story) -> None:
    for part in (story.first, story.continued):
        every = next(one for one in part.definitions if one.glob_name == "*")
        assert every.step_metric == STEP
        assert every.options.step_sync
        assert any(one.name == STEP for one in part.definitions)


def curves(rows: list[dict[str, Any]], step: str) -> list[tuple[int, dict[str, float]]]:
    """Logged points that have a value beside the epoch."""
    other = {"epoch", step}
    points = [
        (int(row[step]), {k: float(v) for k, v in row.items() if not (k in other or k.startswith("_") or v == "")})
        for row in rows
        if not any(isinstance(value, Mapping) for value in row.values())
    ]
    return [(at, values) for at, values in points if values]


def test_the_history_is_what_stands_in_metrics_csv(story: Story) -> None:
    expected = curves(story.rows, "step")
    assert [at for at, values in expected if "loss" in values] == [0, 1, 2]
    assert {"loss/msr", "lr", "online/knn"} <= {name for _, values in expected for name in values}
    assert curves(story.first.history, STEP) == expected
    both = curves([*story.first.history, *story.continued.history], STEP)
    assert both == curves(table(story.folder / "metrics.csv"), "step")
    assert [at for at, values in both if "loss" in values] == [0, 1, 2, 3, 4, 5]


def test_the_summary_has_the_final_numbers(story: Story) -> None:
    summary, results = story.first.summary, story.results
    assert summary["metric"] == results["metric"]["value"] == story.sweep.values[0]
    records = Records.from_json(results)
    for row in records.where("accuracy", encoder="trained"):
        assert summary[f"knn_dino/{row.fitted_on}/{row.split}"] == row.value
    for row in records.where("gap", encoder="trained"):
        assert summary[f"knn_dino/{row.fitted_on}/{row.split}_minus_{row.minus}_points"] == row.value
    for name in ("images_per_second", "peak_memory_mb", "wall_time_s"):
        assert summary[name] == results[name]
    for name in ("loss", "online/knn"):
        assert summary[name] == results["final"][name]


def test_pictures_are_logged(story: Story) -> None:
    captions = json.loads((story.folder / "figures" / "captions.json").read_text())
    for part in (story.first, story.continued):
        row = next(row for row in part.history if "pictures/views" in row)
        for file, caption in captions.items():
            logged = row[f"pictures/{Path(file).stem}"]
            assert (logged["_type"], logged["caption"]) == ("image-file", caption)
            assert imread(part.folder / "files" / logged["path"]).ndim == 3
    shown = part.folder / "files" / logged["path"]
    assert np.array_equal(imread(shown), imread(story.folder / "figures" / file))


@pytest.mark.parametrize("name", ["accuracy", "gap", "strata"])
def test_final_tables_are_logged(name: str, story: Story) -> None:
    rows = story.results["records"][name]
    logged = next(row[f"records/{name}"] for row in story.first.history if f"records/{name}" in row)
    assert logged["_type"] == "table-file"
    content = json.loads((story.first.folder / "files" / logged["path"]).read_text())
    assert content["columns"] == list(dict.fromkeys(key for row in rows for key in row))
    assert content["data"] == [[row.get(key) for key in content["columns"]] for row in rows]


def test_artifacts_stay_as_they_were(story: Story) -> None:
    for part, epochs in ((story.first, 1), (story.continued, 2)):
        contents = {kind: part.artifacts[kind].manifest.contents for kind in ("model", "encoder")}
        assert [entry.path for entry in contents["model"]] == ["last.ckpt"]
        assert [entry.path for entry in contents["encoder"]] == ["encoder.json", "encoder.safetensors"]
        files = {entry.path: Path(entry.local_path) for kind in contents.values() for entry in kind}
        assert all(file.is_relative_to(story.folder) for file in files.values())
        assert torch.load(files["last.ckpt"], weights_only=True)["global_step"] == 3 * epochs
        assert part.artifacts["model"].name == f"checkpoint-{part.run.run_id}"
    assert files["encoder.safetensors"].read_bytes() == (story.folder / "encoder.safetensors").read_bytes()
    # A checkpoint is large, so it lies on the disk once.
    assert files["last.ckpt"].samefile(story.folder / "checkpoints" / "last.ckpt")


def test_artifacts_say_what_they_are(story: Story) -> None:
    saved = json.loads((story.folder / "environment.json").read_text())
    for part in (story.first, story.continued):
        aliases = {kind: set(artifact.aliases) for kind, artifact in part.artifacts.items() if kind != "run_table"}
        whole = {"latest", "best", "last"}
        assert aliases == {"model": whole, "encoder": whole, "report": {"latest", "last"}, "dataset": {"latest"}}
        for kind in ("model", "encoder", "report"):
            metadata = json.loads(part.artifacts[kind].metadata)
            assert metadata["metric"]["name"] == "knn-dino/balanced/mixed_rand"
            assert metadata["choices"] == saved["choices"]
            assert metadata["environment"]["commit"] == saved["commit"]
        assert [entry.path for entry in part.artifacts["report"].manifest.contents] == ["report.html", "results.json"]
    metric = json.loads(story.first.artifacts["model"].metadata)["metric"]
    assert metric == story.results["metric"]


def test_the_data_set_is_an_input(story: Story) -> None:
    for part in (story.first, story.continued):
        artifact = part.artifacts["dataset"]
        assert (artifact.name, artifact.use_after_commit) == ("data-confounded", True)
        assert json.loads(artifact.metadata) == part.config["data"]
        assert not part.artifacts["model"].use_after_commit
    assert story.first.artifacts["dataset"].digest == story.continued.artifacts["dataset"].digest  # one version


def test_the_report_is_shown(story: Story) -> None:
    shown = next(row["report"] for row in story.continued.history if "report" in row)
    page = story.continued.folder / "files" / shown["path"]
    assert page.read_bytes() == (story.folder / "report.html").read_bytes()


def test_a_job_knows_its_sweep(story: Story) -> None:
    for part, lam in ((story.first, 1.0), (story.refused, 0.5), (story.continued, 1.0)):
        assert part.run.run_group == "sweep"
        assert part.run.job_type == f"regularizer.lam={lam}"
        assert part.run.display_name == f"moco-msr-patch-confounded-tiny regularizer.lam={lam} seed=0"


def test_the_end_is_recorded(story: Story) -> None:
    assert (story.first.exit_code, story.refused.exit_code, story.continued.exit_code) == (0, 2, 0)
    assert story.sweep.complaints.splitlines() == ["lam=0.5 is bad luck; take another."]


def test_a_continued_run_keeps_its_identity(story: Story) -> None:
    assert story.identities == [story.first.run.run_id] * 2
    assert story.continued.run.run_id == story.first.run.run_id != story.refused.run.run_id


def test_everything_lies_in_the_run_folder(story: Story) -> None:
    for job in (story.folder, story.sweep.folder / "1"):  # the service of the first job serves the second one
        RunFolder(job).require_inside()
    assert {"wandb", "wandb_id"} <= {path.name for path in story.folder.iterdir()}
    assert len(list((story.folder / "wandb").glob("offline-run-*"))) == 2
    assert os.environ["WANDB_DATA_DIR"] == str(story.folder / "wandb")
    # Of what lies elsewhere in the folder, only the small tables are copied.
    copied = [file.stat().st_size for file in (story.folder / "wandb" / "artifacts").rglob("*") if file.is_file()]
    assert sum(copied) < 1e5 < (story.folder / "encoder.safetensors").stat().st_size


# W&B alone


def wandb_logger(folder: Path, facts: About = FRESH, **changes: Any) -> WeightsAndBiases:
    return WeightsAndBiases(
        folder, facts, **{"project": "p", "entity": None, "mode": "auto", "artifacts": True, **changes}
    )


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("a bug"), 1), (UserError("a mistake"), 2), (SystemExit(75), 75), (None, 0)]
)
def test_the_dashboard_learns_how_the_run_ended(error: BaseException | None, code: int, tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path)
    with pytest.raises(type(error)) if error else nullcontext(), closing([logger]):
        if error is not None:
            raise error
    (only,) = sent(tmp_path)
    assert only.exit_code == code
    assert only.preempting == (code == 75)
    assert logger.run is None


def test_an_agent_that_stops_a_run_does_not_get_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = wandb_logger(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "asweep")
    logger.close(75)
    (only,) = sent(tmp_path)
    assert (only.exit_code, only.preempting) == (75, False)


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for logger in (wandb_logger(tmp_path), MetricsFile(tmp_path, FRESH), TensorBoard(tmp_path, FRESH)):
        logger.log_metrics({"loss": 1.0}, 0)
        if not isinstance(logger, MetricsFile):
            logger.show(loggers.figures(story.folder), 0)
            logger.histograms({"gradients/a": np.ones(3)}, 0)
            logger.conclude(story.folder)
            logger.close(0)
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_where_wandb_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file, where W&B needs a folder")
    few = ("regularizer=none", "evaluation=none", "trainer.max_epochs=1", "~callbacks.online")
    done = finish(tmp_path, *few, "logger=wandb", "metric=loss")
    (line,) = done.complaints.splitlines()
    assert line.startswith("W&B cannot write (")
    assert line.endswith("; the run goes on without it.")
    assert [row["step"] for row in table(done.folder / "metrics.csv")] == ["0", "1", "2"]
    assert (done.folder / "results.json").exists()


def test_a_damaged_id_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb_id").write_bytes(b"\xff")
    wandb_logger(tmp_path, about(resumed_at=3))
    assert f"{tmp_path}/wandb_id is damaged (it is not text in UTF-8); remove it" in capsys.readouterr().err


def test_wandb_may_fail_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], story: Story
) -> None:
    def fail(_: Any) -> None:
        raise OSError("No space left.\nOn the device.")

    logger = wandb_logger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    with monkeypatch.context() as broken:
        broken.setattr(logger.run, "log", fail)
        logger.log_metrics({"loss": 2.0}, 1)
    assert capsys.readouterr().err == "W&B cannot write (No space left); the run goes on without it.\n"
    logger.log_metrics({"loss": 3.0}, 2)  # a curve with a hole would be worse than one that ends
    logger.conclude(story.folder)
    logger.close(0)
    assert capsys.readouterr().err == ""
    (only,) = sent(tmp_path)
    assert curves(only.history, STEP) == [(0, {"loss": 1.0})]
    assert (only.exit_code, only.artifacts) == (0, {})


def test_wandb_may_fail_at_the_start_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], story: Story
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.Error("")

    logger = wandb_logger(tmp_path)
    monkeypatch.setattr(type(logger.run), "finish", fail)
    logger.close(1)
    assert capsys.readouterr().err == "W&B cannot write (Error); the run goes on without it.\n"
    monkeypatch.setattr(wandb, "init", fail)
    logger = wandb_logger(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
    logger.log_metrics({"loss": 1.0}, 0)
    logger.conclude(story.folder)
    logger.close(0)
    assert (logger.version, capsys.readouterr().err) == (None, "")


@pytest.fixture
def fresh_service() -> Iterator[None]:
    """W&B reads its variables once."""
    wandb.teardown()
    yield
    wandb.teardown()


def test_variables_come_before_our_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_service: None) -> None:
    said = {"PROJECT": "theirs", "NAME": "a-name", "RUN_ID": "anid", "DIR": str(tmp_path / "there")}
    said |= {"TAGS": "one,two", "NOTES": "a note", "RUN_GROUP": "a-group", "JOB_TYPE": "a-type", "ENTITY": "us"}
    for name, value in said.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "run").mkdir()
    (tmp_path / "there").mkdir()
    logger = wandb_logger(tmp_path / "run")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.close(0)
    (only,) = sent(tmp_path / "there")
    run = only.run
    assert (run.project, run.display_name, run.run_id, run.entity) == ("theirs", "a-name", "anid", "us")
    assert (list(run.tags), run.notes, run.run_group, run.job_type) == (["one", "two"], "a note", "a-group", "a-type")
    assert (tmp_path / "run" / "wandb_id").read_text() == "anid"


@pytest.mark.parametrize("disabled", [False, True])
def test_the_state_of_the_code_is_saved(
    disabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_service: None
) -> None:
    if disabled:
        monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    home = tmp_path / "checkout"
    home.mkdir()
    git = ("git", "-C", str(home), "-c", "user.name=a", "-c", "user.email=a@b.c")
    (home / "code.py").write_text("one\n")
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr("icl_msr.training.loggers.wandb.CHECKOUT", home)
    for number, text in enumerate(("one\n", "two\n")):
        (home / "code.py").write_text(text)
        folder = tmp_path / str(number)
        folder.mkdir()
        wandb_logger(folder).close(0)
        (only,) = sent(folder)
        assert only.run.git.commit == ("" if disabled else commit)
        assert ("diff.patch" in only.files) == (text == "two\n" and not disabled)
    if not disabled:
        difference = (only.folder / "files" / "diff.patch").read_text()
        assert "-one\n+two\n" in difference


def test_the_best_checkpoint_is_kept_beside_the_last_one(tmp_path: Path) -> None:
    best = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, monitor: loss, mode: max, filename: highest}"
    few = ("regularizer=none", "negatives=none", "evaluation=none", "~callbacks.online", "metric=loss")
    done = finish(tmp_path, *few, "logger=wandb", f"+callbacks.best={best}")
    (only,) = sent(done.folder)
    kept = {entry.path: set(one.aliases) for one in only.every_artifact for entry in one.manifest.contents}
    assert kept["highest.ckpt"] == {"latest", "best"}
    assert kept["last.ckpt"] == kept["encoder.safetensors"] == {"latest", "last"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A W&B server that refuses everybody, and what it was asked; a user at home nowhere; no mode."""
    asked: list[str] = []

    class Refusal(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    wandb.teardown()
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
        monkeypatch.delenv("WANDB_MODE")
        yield asked
        wandb.teardown()
        listening.shutdown()


@pytest.mark.parametrize(
    ("key", "mode", "said"),
    [
        (None, "auto", None),
        (None, "online", "nobody is logged in; type wandb login"),
        ("garbage", "auto", "WANDB_API_KEY invalid"),
        ("0123456789" * 4, "auto", "401"),
        ("0123456789" * 4, "offline", None),
    ],
)
def test_without_an_account_the_run_is_kept_offline(
    key: str | None,
    mode: str,
    said: str | None,
    server: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    logger = wandb_logger(tmp_path, mode=mode)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.close(0)
    complaint = capfd.readouterr().err
    if said is None:
        assert complaint == ""
    else:
        assert complaint.startswith("W&B cannot be reached (")
        assert complaint.count("\n") == 1
        assert said in complaint
    assert bool(server) == (said == "401")  # nobody else is called
    part = sent(tmp_path)[-1]
    assert part.folder.name.startswith("offline-run-")
    assert curves(part.history, STEP) == [(0, {"loss": 1.0})]
    assert part.run.run_id == (tmp_path / "wandb_id").read_text()
    assert not (tmp_path / "home").exists()


def test_with_an_account_the_run_is_sent_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def init(**keys: Any) -> Any:
        calls.append(keys)
        return SimpleNamespace(id=keys["id"], dir=str(tmp_path / "wandb" / "files"), define_metric=Mock(), save=Mock())

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "wandb" / "files").mkdir(parents=True)
    facts = about(group="a-sweep", job_type="method=moco")
    ids = [wandb_logger(tmp_path, facts).version]
    ids += [wandb_logger(tmp_path, about(resumed_at=3)).version]
    ids += [wandb_logger(tmp_path).version]  # begun anew in the same folder
    assert ids[0] == ids[1] != ids[2]
    assert [(call["mode"], call["resume"]) for call in calls] == [("online", "allow")] * 3
    assert (calls[0]["group"], calls[0]["job_type"]) == ("a-sweep", "method=moco")


def test_wandb_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = wandb_logger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.conclude(story.folder)
    logger.close(0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(
        UserError, match=r"^WANDB_MODE=of is not allowed; it should be online, offline, disabled or not"
    ):
        wandb_logger(tmp_path)


def test_a_summary_of_many_runs_is_sent_as_tables(tmp_path: Path) -> None:
    for regularizer in ("none", "msr"):
        for seed in range(2):
            write_run(tmp_path / f"{regularizer}-{seed}", "moco", regularizer, seed)
    assert report([str(tmp_path), "--wandb", "a-project"]) == 0
    (board,) = sent(tmp_path)
    assert board.run.project == "a-project"
    assert board.exit_code == 0
    files = {name: row[name]["path"] for row in board.history for name in row if name in ("summary", "differences")}
    tables = {name: json.loads((board.folder / "files" / path).read_text()) for name, path in files.items()}
    with (tmp_path / "summary.csv").open() as lines:
        header, *expected = csv.reader(lines)
    assert tables["summary"]["columns"] == header
    assert [list(map(str, row)) for row in tables["summary"]["data"]] == expected
    asked = tables["differences"]["columns"]
    rows = [dict(zip(asked, row, strict=True)) for row in tables["differences"]["data"]]
    (compared,) = json.loads((tmp_path / "summary.json").read_text())["differences"]
    assert [row["mean"] for row in rows] == [difference["mean"] for difference in compared["differences"]]
    assert {(row["configuration"], row["minus"]) for row in rows} == {("msr", "none")}


def test_wandb_is_imported_only_when_it_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; from icl_msr.cli.command import main; from icl_msr.cli.job import run\n"
        "assert 'wandb' not in sys.modules\n"
        "assert main(run, sys.argv[1:]) == 0\n"
        "assert 'wandb' not in sys.modules\n"
    )
    few = ["regularizer=none", "evaluation=none", "trainer.max_epochs=1", "~callbacks.online"]
    line = [
        sys.executable,
        "-c",
        code,
        *WORDS,
        *TRAINER,
        *few,
        "logger=csv",
        "metric=loss",
        f"hydra.run.dir={tmp_path}",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.json").exists()


# metrics.csv


def test_new_columns_may_come_in_the_middle(tmp_path: Path) -> None:
    logger = MetricsFile(tmp_path, FRESH)
    logger.log_metrics({"loss": 1.0, "epoch": 0}, 0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,loss\n0,0,1.0\n"
    logger.log_metrics({"online/knn": 0.5, "epoch": 0}, 1)
    logger.log_metrics({"loss": 2.0}, 2)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,loss,online/knn\n0,0,1.0,\n0,1,,0.5\n,2,2.0,\n"


def test_a_continued_run_keeps_what_its_checkpoint_has_seen(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, FRESH)
    for step in range(6):
        first.log_metrics({"loss": float(step)}, step)
    first.log_metrics({"online/knn": 0.5}, 3)
    first.log_metrics({"late": 0.1}, 5)
    again = MetricsFile(tmp_path, about(resumed_at=4))
    again.log_metrics({"loss": 40.0}, 4)
    assert (tmp_path / "metrics.csv").read_text() == (
        "epoch,step,loss,online/knn\n,0,0.0,\n,1,1.0,\n,2,2.0,\n,3,3.0,\n,3,,0.5\n,4,40.0,\n"
    )
    MetricsFile(tmp_path, FRESH)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step\n"


def test_no_spreadsheet_runs_the_name_of_a_number(tmp_path: Path) -> None:
    for step in range(2):
        logger = MetricsFile(tmp_path, about(resumed_at=step))
        logger.log_metrics({"=1+1": -0.5, "a,b": 1.0}, step)
    assert (tmp_path / "metrics.csv").read_text() == 'epoch,step,\'=1+1,"a,b"\n,0,-0.5,1.0\n,1,-0.5,1.0\n'


@pytest.mark.parametrize("torn", [",1,0.12", ",1", "", ",1,0.125,"])
def test_a_row_that_a_kill_has_cut_is_left_out(torn: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(f"epoch,step,loss,lr\n,0,1.0,0.1\n{torn}")
    again = MetricsFile(tmp_path, about(resumed_at=2))
    again.log_metrics({"loss": 2.0, "lr": 0.1}, 2)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,loss,lr\n,0,1.0,0.1\n,2,2.0,0.1\n"


# TensorBoard


def events(folder: Path, name: str = FRESH.name) -> EventAccumulator:
    """Return what TensorBoard shows of a run by its name."""
    home = folder / "tensorboard" / name
    found = EventAccumulator(str(home), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_tensorboard_shows_curves_final_numbers_and_pictures(tmp_path: Path, story: Story) -> None:
    few = ("regularizer=none", "evaluation=none", "trainer.max_epochs=1")
    done = finish(tmp_path, *few, "logger=tensorboard")
    name = "moco-none-patch-confounded-tiny seed=0"
    assert [path.name for path in (done.folder / "tensorboard").iterdir()] == [name]
    found = events(done.folder, name)
    for name in ("loss", "lr", "online/knn"):
        rows = [row for row in table(done.folder / "metrics.csv") if row[name]]
        assert scalars(found, name) == [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows]
    assert scalars(found, "final/metric") == [(0, pytest.approx(done.values[0]))]
    (text,) = found.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert "\n      temperature: 0.2\n" in text.decode()
    table_row = HParamsPluginData.FromString(
        found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert table_row["method.temperature"].number_value == 0.2
    assert table_row["choices.method"].string_value == "moco"
    # The run before had all pictures but that of an evaluation which it did not choose.
    drawn = set(PICTURES) - {"attention.png"}
    logger = TensorBoard(tmp_path, FRESH)
    logger.conclude(story.folder)
    logger.close(0)
    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {f"pictures/{Path(name).stem}" for name in drawn}
    picture = imread(story.folder / "figures" / "views.png")
    (shown,) = found.Images("pictures/views")
    assert (shown.height, shown.width) == picture.shape[:2]
    row = Outcome.load(story.folder).records.where("accuracy", encoder="trained")[0]
    name = f"knn_dino/{row.fitted_on}/{row.split}"
    assert scalars(found, f"final/{name}") == [(0, pytest.approx(row.value))]


def test_tensorboard_forgets_what_a_continued_run_repeats(tmp_path: Path) -> None:
    for facts, steps, value in ((FRESH, range(6), 1.0), (about(resumed_at=4), range(4, 8), 2.0)):
        logger = TensorBoard(tmp_path, facts)
        for step in steps:
            logger.log_metrics({"loss": value}, step)
        logger.close(0)
    assert scalars(events(tmp_path), "loss") == [(i, 1.0 if i < 4 else 2.0) for i in range(8)]


def test_tensorboard_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{flag}", False)
    with pytest.raises(UserError, match=r"^logger=tensorboard needs tensorboard.*pip install 'icl-msr\[tensorboard\]'"):
        TensorBoard(tmp_path, FRESH)
