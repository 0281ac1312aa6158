"""W&B's sweeps, agents, `wandb sync` and saved dashboards, against a server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.programs import steps, until
from support.tiny import DATA, MODEL, composed
from support.wandb_server import Server, serving

from icl_msr.core.config import check

SWEEPS = sorted((Path(__file__).parents[2] / "experiments" / "sweeps").glob("*.yaml"))
SMALL = [*DATA, *MODEL, "trainer.limit_train_batches=3", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
LIGHT = ["evaluation=light", "regularizer=none"]


def values(sweep: dict[str, Any]) -> list[str]:
    """Return one word for each parameter, with its first or smallest value."""
    return [
        f"{name}={given['values'][0] if 'values' in given else given['min']}"
        for name, given in sweep["parameters"].items()
    ]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_words_of_every_sweep_are_a_config(file: Path) -> None:
    sweep = yaml.safe_load(file.read_text())
    check(composed(*values(sweep)))
    assert sweep["metric"]["name"] in ("metric", "online/knn")
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "icl_msr.run"]
    assert sweep["command"][-1] == "${args_no_hyphens}"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as known:
        yield known


def logged_in(home: Path, server: Server) -> dict[str, str]:
    """Return the variables of somebody who has an account."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    ours |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    return ours | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_ERROR_REPORTING": "false"}


def run(tmp_path: Path, server: Server, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as somebody who is logged in."""
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=logged_in(tmp_path, server) | more,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("agents", [1, 4])
def test_agents_run_a_sweep_of_two_ranks_each(agents: int, server: Server, tmp_path: Path) -> None:
    """One agent runs all, or four agents at once run one each: every run is one run in W&B."""
    sweep = yaml.safe_load(next(file for file in SWEEPS if file.stem == "grid").read_text())
    ranks = ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2", "logger.wandb.artifacts=false"]
    sweep["command"][-1:] = [*SMALL, "evaluation=light", *ranks, sweep["command"][-1]]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    run(tmp_path, server, "wandb", "sweep", "--project", "icl-msr", "--entity", "me", "sweep.yaml")
    assert yaml.safe_load(server.config)["method"] == "grid"
    wanted = [(name, seed) for name in ("none", "msr") for seed in (0, 1)]
    server.waiting = [{"regularizer": name, "seed": seed} for name, seed in wanted]
    agent = ["wandb", "agent", "--count", str(4 // agents), "me/icl-msr/sweep1"]
    with ThreadPoolExecutor(agents) as pool:
        list(pool.map(lambda _: run(tmp_path, server, *agent), range(agents)))
    assert sorted(server.runs) == ["run1", "run2", "run3", "run4"]
    assert server.ended == dict.fromkeys(server.runs, 0)
    for name, (regularizer, seed) in zip(sorted(server.runs), wanted, strict=True):
        folder = tmp_path / "runs" / "wandb" / "sweep1" / name
        results = json.loads((folder / "results.json").read_text())
        assert (results["choices"]["regularizer"], results["seed"]) == (regularizer, seed)
        assert (folder / "wandb_id").read_text() == name
        assert server.runs[name]["derived"]["value"]["ranks"] == 2
        assert [line["trainer/global_step"] for line in server.history[name] if "loss" in line] == [0, 1, 2]


@pytest.mark.slow
def test_the_parts_of_an_offline_run_are_synced_as_one(server: Server, tmp_path: Path) -> None:
    words = [*SMALL, *LIGHT, "logger.wandb.artifacts=false", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "icl_msr.run", *words]
    run(tmp_path, server, *command, WANDB_MODE="offline")
    run(tmp_path, server, *command, "trainer.max_epochs=2", WANDB_MODE="offline")
    assert not server.runs
    run(tmp_path, server, "wandb", "sync", "run/wandb")
    ((name, lines),) = server.history.items()
    assert name == (tmp_path / "run" / "wandb_id").read_text()
    assert [line["trainer/global_step"] for line in lines if "loss" in line] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_preempted_run_is_synced_whole(server: Server, tmp_path: Path) -> None:
    words = [*SMALL, "regularizer=none", "evaluation=none", "~callbacks.online", "metric=loss", "trainer.max_epochs=60"]
    command = [sys.executable, "-m", "icl_msr.run", *words, "hydra.run.dir=run"]
    offline = {"WANDB_MODE": "offline"}
    with subprocess.Popen(command, cwd=tmp_path, env=logged_in(tmp_path, server) | offline) as first:
        until(lambda: steps(tmp_path / "run") > 5 or first.poll())
        first.terminate()
    assert first.returncode == 75
    run(tmp_path, server, *command, **offline)
    run(tmp_path, server, "wandb", "sync", "run/wandb")
    ((_, lines),) = server.history.items()
    assert [line["trainer/global_step"] for line in lines if "loss" in line] == list(range(180))


@pytest.mark.slow
def test_dashboards_are_saved(server: Server, tmp_path: Path) -> None:
    done = run(tmp_path, server, sys.executable, "-m", "icl_msr.dashboard", "--to", "boards")
    assert [view["displayName"] for view in server.views] == [
        "icl-msr: one run", "icl-msr: sweep", "Does the encoder look at the object or at the background?"
    ]  # fmt: skip
    written = [tmp_path / "boards" / f"{name}.json" for name in ("workspace-run", "workspace-sweep", "report")]
    for view, file in zip(server.views, written, strict=True):
        assert json.loads(view["spec"]) == json.loads(file.read_text())
    assert done.stdout.count("http") == 3
