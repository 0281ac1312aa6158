"""Whatever stops a job, the run goes on to the weights that it would have had."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import same, steps, until
from support.slurm import WORDS, Batch, Cluster
from support.uploads import sent

pytestmark = pytest.mark.slow

STEPS = 200
LONG = " ".join(
    [
        *(WORDS, "trainer.max_epochs=25", "callbacks.checkpoints.every_n_epochs=100", "hydra.run.dir=run"),
        *("hardware.requeue=true", "+callbacks.slowly._target_=support.slowly.Slowly"),
    ]
)
WANDB = f"{LONG} logger=wandb"
STOPPED = "all is saved. Continue with: python -m icl_msr.run resume="
SLOWLY = {"SLOWLY": "0.7"}
OFFLINE = {**SLOWLY, "WANDB_MODE": "offline"}


def weights(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == steps
    return content["state_dict"]


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    cluster.command(f"$RUN {LONG}", folder)
    return weights(folder / "run")


@pytest.fixture(scope="module")
def slow_jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Batch]:
    """Jobs that SLURM stops after a minute or so, while other tests run."""
    home = tmp_path_factory.mktemp("slow")
    warned = ("--time=2", "--signal=USR1@60", "-n1", "-w", "n1", "--requeue")
    late = ("--time=1", "-n1", "-w", "n1", "--requeue")
    return {
        "warned": cluster.submit(f"srun $RUN {WANDB}", home / "warned", *warned, **OFFLINE),
        "late": cluster.submit(f"srun $RUN {LONG}", home / "late", *late, **SLOWLY),
    }


def begun(job: Batch, least: int = 4) -> None:
    """Wait until some steps are done."""
    until(lambda: steps(job.folder / "run") >= least or job.state not in ("PENDING", "RUNNING"))
    assert job.state == "RUNNING", job.err


def story(job: Batch, cause: str) -> None:
    """Print what happened, and check that the job was stopped in the middle and said so once."""
    lines = [line for line in job.err.splitlines() if not line.startswith(("srun: ", "slurmstepd"))]
    continued = [line for line in job.out.splitlines() if line.startswith("Continuing")]
    print("\n".join([*job.err.splitlines(), *continued, job.state]))
    assert [line for line in lines if STOPPED in line] == [lines[0]]
    assert lines[0].startswith(f"Stopped by {cause} after ")
    assert all(line.startswith("SLURM ") for line in lines[1:])
    assert "Traceback" not in job.err


def whole_curves(job: Batch) -> None:
    """Check that W&B has every point of the curves once, in one run of two parts."""
    uploads = sent(job.folder / "run")
    assert len(uploads) == 2
    assert len({upload.run.run_id for upload in uploads}) == 1
    assert [int(row["trainer/global_step"]) for part in uploads for row in part.history if "loss" in row] == [
        *range(STEPS)
    ]
    assert [upload.exit_code for upload in uploads] == [75, 0]
    assert [upload.preempting for upload in uploads] == [True, False]


def test_a_cancelled_job_is_saved_and_not_requeued(
    whole: dict[str, Any], slow_jobs: Any, cluster: Cluster, tmp_path: Path
) -> None:
    """The same command continues it."""
    job = cluster.submit(f"srun $RUN {LONG}", tmp_path, "-n1", "-w", "n2", "--requeue", **SLOWLY)
    begun(job)
    cluster.ask("scancel", job.number)
    assert job.wait() == "CANCELLED"
    story(job, "SIGTERM")
    again = cluster.submit(f"srun $RUN {LONG}", tmp_path, "-n1", "-w", "n2")
    assert again.wait() == "COMPLETED", again.err
    same(weights(tmp_path / "run"), whole)


def test_a_preempted_job_runs_again(whole: dict[str, Any], slow_jobs: Any, cluster: Cluster, tmp_path: Path) -> None:
    """PreemptMode=REQUEUE: SLURM itself runs it again. Its signal reaches all processes that are below the tasks."""
    job = cluster.submit(f"srun $RUN {WANDB}", tmp_path, "-n1", "-c2", "-w", "n2", "--requeue", **OFFLINE)
    begun(job)
    urgent = cluster.submit("sleep 1", tmp_path / "urgent", "-p", "high", "-n1", "-c2", "-w", "n2")
    assert urgent.wait() == "COMPLETED"
    assert job.wait() == "COMPLETED", job.err
    assert job.restarts == 1
    story(job, "SIGTERM")
    same(weights(tmp_path / "run"), whole)
    whole_curves(job)


def test_a_warned_job_is_requeued_and_loses_no_point_of_its_curves(whole: dict[str, Any], slow_jobs: Any) -> None:
    """SLURM's warning signal, in the middle of a W&B run."""
    job = slow_jobs["warned"]
    assert job.wait() == "COMPLETED", job.err
    assert job.restarts == 1
    story(job, "SIGUSR1")
    same(weights(job.folder / "run"), whole)
    whole_curves(job)


def test_a_job_at_its_time_limit_is_requeued(whole: dict[str, Any], slow_jobs: Any) -> None:
    job = slow_jobs["late"]
    assert job.wait() == "COMPLETED", job.err
    assert job.restarts >= 1
    story(job, "SIGTERM")
    same(weights(job.folder / "run"), whole)


TWO = LONG.replace("trainer.max_epochs=25", "trainer.max_epochs=5").replace("every_n_epochs=100", "every_n_epochs=1")


@pytest.fixture(scope="module")
def whole_of_two(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of a run on two ranks that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    cluster.command(f"$RUN {TWO} hardware.devices=2", folder)
    return weights(folder / "run", 40)


def test_a_rank_that_dies_takes_the_job_down(whole_of_two: dict[str, Any], cluster: Cluster, tmp_path: Path) -> None:
    """And the job continues from its last checkpoint when somebody requeues it."""
    job = cluster.submit(f"srun $RUN {TWO} hardware.devices=2", tmp_path, "-n2", "-N1", "--requeue", **SLOWLY)
    begun(job, 10)
    os.kill(cluster.task(job.number, 1), signal.SIGKILL)
    began = time.monotonic()
    assert job.wait(90) == "FAILED"
    print(f"rank 1 was killed, and the job had ended after {time.monotonic() - began:.0f} s")
    cluster.ask("scontrol", "requeue", job.number)
    assert job.wait() == "COMPLETED", job.err
    assert f"Continuing {tmp_path}/run from step 8." in job.out
    same(weights(tmp_path / "run", 40), whole_of_two)


def test_a_node_that_dies_takes_the_job_down(whole_of_two: dict[str, Any], cluster: Cluster, tmp_path: Path) -> None:
    """SLURM runs the job again when the node is back."""
    job = cluster.submit(f"srun $RUN {TWO} hardware.nodes=2", tmp_path, "-n2", "-N2", "--requeue", **SLOWLY)
    begun(job, 10)
    cluster.kill_node("n2")
    until(lambda: job.state == "PENDING", 120)
    cluster.start_node("n2")
    assert job.wait() == "COMPLETED", job.err
    assert job.restarts == 1
    assert f"Continuing {tmp_path}/run from step 8." in job.out
    same(weights(tmp_path / "run", 40), whole_of_two)
