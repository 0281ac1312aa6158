"""Optuna chooses the tasks of arrays: one command leads, and SLURM spreads the trials over the nodes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.slurm import WORDS, Cluster

from icl_msr.core.folder import RunFolder

pytestmark = pytest.mark.slow


def test_a_search_over_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """Three trials at a time, one value is impossible, and the same command goes on where it ended."""
    words = ["-m", *WORDS.split(), "trainer.max_epochs=1", "metric=loss", "hydra.sweep.dir=sweep"]
    words += ["hydra/launcher=slurm", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=3"]
    words += ["loader.batch_size=8,16,1000000", "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler"]

    def command(trials: int) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "icl_msr.run", *words, f"hydra.sweeper.n_trials={trials}"],
            env=cluster.environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        print(done.stdout, done.stderr)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    first = command(3)
    assert "Submitted 3 jobs" in "\n".join(first)
    lines = command(6)
    assert lines[0].startswith("Continuing sweep; jobs done so far: ")
    jobs = [RunFolder(tmp_path / "sweep" / str(number)) for number in range(6)]
    metrics = [job.metric() for job in jobs if job.done]
    assert 2 <= len(metrics) < 6
    (best,) = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())["solutions"]
    assert best["values"]["metric"] == max(metrics)
    assert lines[-2].startswith(
        f"Best of 6 trials: metric {max(metrics):.4f} in {best['folder']} with loader.batch_size="
    )
