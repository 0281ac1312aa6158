"""A sweep as an array: jobs fail, machines die, and the same command finishes what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.programs import same, steps, until
from support.slurm import WORDS, Cluster

from icl_msr.core.folder import RunFolder

pytestmark = pytest.mark.slow

JOBS = f"{WORDS} trainer.max_epochs=4 metric=loss +callbacks.slowly._target_=support.slowly.Slowly"


def sweep(cluster: Cluster, folder: Path, **variables: str) -> "subprocess.Popen[str]":
    """Start the command whose array has six tasks, at most four of them at a time on the two nodes."""
    words = ["-m", "seed=0,1,2,3,4,5", "hydra/launcher=slurm", "hydra.launcher.signal=null", "hydra.sweep.dir=sweep"]
    return subprocess.Popen(
        [sys.executable, "-m", "icl_msr.run", *words, *JOBS.split()],
        env={**cluster.environment(), **variables},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def on_node(cluster: Cluster, node: str) -> list[int]:
    """Return the numbers of the tasks that run on a node and have done some steps."""
    lines = cluster.ask("squeue", "-h", "-r", "-t", "running", "-w", node, "-o", "%K").split()
    return [int(number) for number in lines if number.isdecimal()]


def test_a_sweep_over_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """One job fails, one node is killed with its jobs, and the same command finishes."""
    command = sweep(cluster, tmp_path, FAILS="3", SLOWLY="1.5")
    jobs = [tmp_path / "sweep" / str(number) for number in range(6)]

    def interrupted() -> list[int]:
        return [number for number in on_node(cluster, "n2") if steps(jobs[number]) > 9]

    until(lambda: interrupted() or command.poll() is not None)
    victims = interrupted()
    assert victims, command.communicate()
    cluster.kill_node("n2")
    print(f"n2 was killed while it ran {victims}")
    until(lambda: "down" in cluster.ask("sinfo", "-h", "-n", "n2", "-o", "%T"), 120)
    cluster.start_node("n2")
    out, err = command.communicate(timeout=600)
    print(out, err)
    assert command.returncode == 1
    assert err == ""
    lines = out.splitlines()
    assert "[4/6] seed=3: FAILED, see sweep/3/job.log" in lines
    assert lines[-1].startswith("Jobs done: 5 of 6; the same command finishes the others.")
    assert len([line for line in lines if ": metric " in line]) == 5
    for number in victims:
        assert "Continuing" in (jobs[number] / "job.log").read_text()

    again = sweep(cluster, tmp_path)
    out, err = again.communicate(timeout=600)
    print(out, err)
    assert (again.returncode, err) == (0, "")
    assert "Submitted 1 jobs" in out
    assert out.splitlines()[-1].startswith("Jobs done: 6 of 6.")
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["finished"]

    cluster.command(f"$RUN seed={victims[0]} {JOBS} hydra.run.dir=alone", tmp_path)
    alone, job = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "alone", jobs[victims[0]])
    )
    same(alone, job)
    assert RunFolder(tmp_path / "alone").metric() == RunFolder(jobs[victims[0]]).metric()
