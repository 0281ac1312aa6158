"""A run that is killed again and again ends like one left alone. `python tests/test_resume.py FOLDER` prints them."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import DATA, MODEL

KILLS = 20
COMMAND = [
    *(sys.executable, "-m", "icl_msr.run", *DATA, *MODEL, "dataset.train=256", "logger=csv", "evaluation=light"),
    *("method=moco", "method.queue_size=50", "regularizer=msr", "regularizer.every=2", "negatives=patch"),
    *("trainer.max_epochs=5", "trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_minutes=0.0001"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(folder: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    with (folder / "output").open("ab") as output:
        return subprocess.Popen(
            [*COMMAND, f"hydra.run.dir={folder}/run"], env=ENVIRONMENT, stdout=output, stderr=output
        )


def checkpoint(folder: Path) -> dict[str, Any]:
    file = folder / "run" / "checkpoints" / "last.ckpt"
    content: dict[str, Any] = torch.load(file, weights_only=True) if file.exists() else {"global_step": 0}
    return content


def kill_and_continue(folder: Path, kills: int, seed: int) -> tuple[dict[str, Any], list[int]]:
    """The last checkpoint of a run that is killed at random moments, and the steps it had saved each time."""
    moments, steps = random.Random(seed), list[int]()
    file = folder / "run" / "checkpoints" / "last.ckpt"
    while len(steps) < kills:
        began = time.monotonic()
        process = start(folder)
        if len(steps) % 4 == 3:  # while modules load or the checkpoint is read
            time.sleep(moments.uniform(0, 8))
        else:  # while it trains: a checkpoint is written after every step
            last = file.stat().st_mtime_ns if file.exists() else 0
            while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == last):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 1.5))
        assert process.poll() is None, (folder / "output").read_text()
        process.kill()
        process.wait()
        steps.append(int(checkpoint(folder)["global_step"]))
        print(
            f"kill {len(steps):2}: SIGKILL after {time.monotonic() - began:4.1f} s, step {steps[-1]} saved", flush=True
        )
    assert start(folder).wait(timeout=600) == 0, (folder / "output").read_text()
    return checkpoint(folder), steps


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not equal to the last bit in weights, queue, momentum encoder, f_msr and its Adam."""
    assert one["state_dict"].keys() == other["state_dict"].keys()

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return bool(a == b)

    parts = {**one["state_dict"], "optimizer": one["optimizer_states"], "schedule": one["lr_schedulers"]}
    others = {**other["state_dict"], "optimizer": other["optimizer_states"], "schedule": other["lr_schedulers"]}
    return [name for name in parts if not equal(parts[name], others[name])]


def compare(folder: Path, kills: int, seed: int = 0) -> list[int]:
    folder.mkdir(exist_ok=True)
    assert start(folder / "whole").wait(timeout=600) == 0, (folder / "whole" / "output").read_text()
    whole = checkpoint(folder / "whole")
    continued, steps = kill_and_continue(folder / "killed", kills, seed)
    assert continued["global_step"] == whole["global_step"]
    assert differing(whole, continued) == []
    metrics = [(folder / name / "run" / "metrics.csv").read_text() for name in ("whole", "killed")]
    assert len(metrics[0].splitlines()) == len(metrics[1].splitlines())
    return steps


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    steps = compare(tmp_path, kills=3)
    assert steps == sorted(steps)
    assert steps[-1] > 0


if __name__ == "__main__":
    saved = compare(Path(sys.argv[1]), KILLS)
    print(f"{KILLS} kills, steps saved {saved}: weights, queue, momentum encoder, f_msr, optimisers are bit-equal")
