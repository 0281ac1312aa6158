"""Whole commands in processes of their own, from the start of Python to the exported encoder.

SimCLR is trained on images of 32 px without an evaluation. Ours is `icl_msr.run`; the others are the scripts beside
this file, written as their documentation recommends. The images are random, or CIFAR-10's with `CIFAR10=FOLDER` in the
environment. Time and memory do not depend on what they show.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from experiments.benchmarks.peers.rows import OURS, OURS_AS_THEIRS, Calls, Row, Size, installed

ROOT = Path(__file__).parents[3]
AS_THEIRS = ("hardware.precision=32-true", "hardware.channels_last=false")


def rows(size: Size) -> list[Row]:
    """Return rows of whole runs and of a single step."""
    images, tiny = size(1024, 16), size(10_000, 16)
    kinds = [
        (f"whole run, tiny, 2 epochs of {tiny} images", "tiny", tiny, 2),
        (f"whole run, ResNet-18, 2 epochs of {images} images", "resnet18", images, 2),
        ("start to the end of the first step, tiny, 256 images", "tiny", size(256, 16), 1),
    ]
    return [
        Row(name, partial(_commands, body, count, epochs), own_memory=False, warm_up=False)
        for name, body, count, epochs in kinds[: size(3, 1)]
    ]


def _commands(body: str, count: int, epochs: int) -> Calls:
    folder = Path(tempfile.mkdtemp())
    file = folder / "images.npz"
    images, labels = _images(count)
    np.savez(file, train_images=images, train_labels=labels, test_images=images[:10], test_labels=labels[:10])
    batch = min(256, count)
    ours = ["-m", "icl_msr.run", "dataset=arrays", f"dataset.path={file}", f"backbone={body}", "method=simclr"]
    ours += ["regularizer=none", "evaluation=none", "~callbacks.online", "logger=csv", "augment=small"]
    ours += [f"trainer.max_epochs={epochs}", f"loader.batch_size={batch}"]
    words = [str(file), body, str(epochs), str(batch)]
    commands = {OURS: ours, OURS_AS_THEIRS: [*ours, *AS_THEIRS]}
    for package in ("lightly", "stable_pretraining"):
        if installed(package):
            commands[package.replace("_", "-")] = [str(Path(__file__).with_name(f"train_{package}.py")), *words]
    return {name: partial(_run, folder, command) for name, command in commands.items()}


def _run(folder: Path, command: list[str]) -> None:
    """Run a command in a new folder; raise RuntimeError if it fails or leaves no encoder."""
    there = Path(tempfile.mkdtemp(dir=folder))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SPT_CACHE_DIR": str(there)}
    done = subprocess.run([sys.executable, *command], cwd=there, env=environment, capture_output=True, check=False)
    if done.returncode or not any(there.rglob("encoder.*")):
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()[-1000:]}")
    shutil.rmtree(there)


def _images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, 32, 32, 3) and labels int64 (N,)."""
    if "CIFAR10" in os.environ:
        from torchvision.datasets import CIFAR10

        there = CIFAR10(os.environ["CIFAR10"])
        return there.data[:count], np.asarray(there.targets[:count])
    noise = np.random.default_rng(0)
    return noise.integers(256, size=(count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10
