"""Every job has a folder of its own, also when several start in one second."""

from pathlib import Path

import pytest
from support.slurm import WORDS, Cluster

from icl_msr.core.records import Outcome

pytestmark = pytest.mark.slow


def test_an_array_that_starts_in_one_second(cluster: Cluster, tmp_path: Path) -> None:
    """The words are the same for all four, and so is the time."""
    job = cluster.submit(f"srun $RUN {WORDS} metric=loss", tmp_path, "--array=0-3", "-n1")
    assert job.wait() == "COMPLETED", job.err
    starts = {fact["StartTime"] for fact in job.facts()}
    folders = sorted((tmp_path / "runs" / "slurm").iterdir())
    print(f"4 tasks started at {sorted(starts)} and wrote to {[folder.name for folder in folders]}")
    assert [folder.name.partition("-")[0] for folder in folders] == [f"{job.number}_{task}" for task in range(4)]
    assert all(Outcome.load(folder).seed == 0 for folder in folders)
    assert job.err == ""


def test_ranks_share_the_folder_of_their_job(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(f"srun $RUN {WORDS} metric=loss hardware.devices=2", tmp_path, "-n2")
    assert job.wait() == "COMPLETED", job.err
    (folder,) = (tmp_path / "runs" / "slurm").iterdir()
    assert (folder / "results.json").exists()
