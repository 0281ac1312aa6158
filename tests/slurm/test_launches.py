"""However the processes of a run are started on SLURM, they train as one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import same
from support.slurm import WORDS, Batch, Cluster

pytestmark = pytest.mark.slow

TWO = f"{WORDS} hardware.devices=2"
APART = f"{WORDS} hardware.nodes=2"
TORCHRUN = "python -m torch.distributed.run --standalone --nproc-per-node 2 -m icl_msr.run"
LAUNCHES: dict[str, tuple[str, tuple[str, ...]]] = {
    # the batch script and the options of sbatch
    "our own processes": (f"$RUN {TWO} hydra.run.dir=run", ("--ntasks=2",)),
    "srun --ntasks": (f"srun --ntasks=2 $RUN {TWO} hydra.run.dir=run", ("--ntasks=2",)),
    "srun --ntasks-per-node": (f"srun $RUN {TWO} hydra.run.dir=run", ("--ntasks-per-node=2", "-N1")),
    "srun on two nodes": (f"srun -N2 -n2 $RUN {APART} hydra.run.dir=run", ("-N2", "-n2")),
    "salloc and srun": (
        f"env -u ENVIRONMENT salloc -n2 --job-name=interactive srun $RUN {TWO} hydra.run.dir=run",
        ("-n1",),
    ),
    "a job named bash": (f"srun $RUN {TWO} hydra.run.dir=run", ("-n2", "--job-name=bash")),
    "a job named interactive": (f"srun $RUN {TWO} hydra.run.dir=run", ("-n2", "--job-name=interactive")),
    "torchrun": (f"srun -n1 -c2 {TORCHRUN} {TWO} hydra.run.dir=run", ("-n1", "-c2")),
}


def weights(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return content


@pytest.fixture(scope="module")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of two processes that the program itself starts, without SLURM."""
    folder = tmp_path_factory.mktemp("reference")
    cluster.command(f"$RUN {TWO} hydra.run.dir=run", folder)
    return weights(folder / "run")


@pytest.mark.parametrize("launch", LAUNCHES)
def test_launches(launch: str, reference: dict[str, Any], cluster: Cluster, tmp_path: Path) -> None:
    script, options = LAUNCHES[launch]
    if launch.startswith("salloc"):
        out, err = cluster.command(script, tmp_path)
        err = "".join(line for line in err.splitlines(True) if not line.startswith("salloc: "))
    else:
        job = cluster.submit(script, tmp_path, *options)
        assert job.wait() == "COMPLETED", job.err
        out, err = job.out, job.err
    assert err == ""
    assert len([line for line in out.splitlines() if " on 2 x CPU" in line]) == 1
    same(weights(tmp_path / "run"), reference)
    print(f"{launch}: {script.replace(WORDS, 'WORDS')}")


def one_process(job: Batch) -> None:
    assert job.wait() == "COMPLETED", job.err
    assert job.err == ""
    assert len([line for line in job.out.splitlines() if " on 1 x CPU" in line]) == 1


def test_an_allocation_without_srun_is_one_process(cluster: Cluster, tmp_path: Path) -> None:
    one_process(cluster.submit(f"$RUN {WORDS} hydra.run.dir=run", tmp_path, "-n2"))


def test_an_interactive_step_is_one_process(cluster: Cluster, tmp_path: Path) -> None:
    out, _ = cluster.command(f"salloc -n2 srun --interactive --pty $RUN {WORDS} hydra.run.dir=run", tmp_path)
    assert len([line for line in out.splitlines() if " on 1 x CPU" in line]) == 1


@pytest.mark.parametrize(("options", "number", "where"), [(("-n2",), "2", "1 machine"), (("-N2",), "2", "2 machines")])
def test_a_misfit_is_one_sentence(
    options: tuple[str, ...], number: str, where: str, cluster: Cluster, tmp_path: Path
) -> None:
    job = cluster.submit(f"srun {' '.join(options)} $RUN {WORDS} hydra.run.dir=run", tmp_path, *options)
    assert job.wait() == "FAILED"
    (line,) = [line for line in job.err.splitlines() if not line.startswith("srun: ")]
    assert line.startswith(f"{number} processes were started together on {where}, and hardware.devices=1 ")
    assert job.out == ""
    assert not (tmp_path / "run").exists()
