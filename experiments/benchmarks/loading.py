"""Measure how fast images reach the trainer, as images per second: medians of alternating rounds in one run.

python experiments/benchmarks/loading.py [--images 1024] [--workers 2] [--rounds 5] [--peers PYTHON] [--tiny]

The source is JPEG files of 400 x 500 pixels; the work is two views of 224 px of each, in batches of 64. All rows decode
an image once and cut two random crops from it.

* bare: the functions that decode and cut, in as many processes, without a loader; and those that only decode;
* ours, from a folder, shards, a Hugging Face table, and S3 on this machine (moto), with an empty and with a full cache;
* torchvision's ImageFolder in torch's DataLoader;
* webdataset and litdata with torchvision's transforms, and NVIDIA DALI on the CPU if it is there, in an environment of
  their own:

    python -m venv peers && peers/bin/pip install torch torchvision webdataset litdata nvidia-dali-cuda120
    python experiments/benchmarks/loading.py --peers peers/bin/python

The processes start before the first round. The first round warms up and is left out. The memory of a worker is what it
has for itself, beyond the imports that it shares with the trainer. Its growth, and that of open files in the trainer
and the workers, is from the second round to the last.
"""

import argparse
import io
import logging
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from experiments.benchmarks.timing import alternate
from icl_msr.cli.sharding import Options, write
from icl_msr.core.config import build, check, config_dir
from icl_msr.data.files import FileSplit
from icl_msr.data.sources import read_image
from icl_msr.training.datamodule import DataModule

HEIGHT, WIDTH, SIDE, BATCH = 400, 500, 224, 64
PEERS = Path(__file__).with_name("loading_peers.py")

Call = Callable[[], object]


def pictures(root: Path, images: int) -> None:
    """Write smooth noise in two classes, `train/<class>/*.jpg`, and one test image of each."""
    random = np.random.default_rng(0)
    for i in range(images + 2):
        part = "train" if i < images else "val"
        path = root / part / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (25, 31, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + random.integers(-12, 13, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


class Bare(Dataset[int]):
    """Decodes batches of images, and cuts two random crops from each, without a loader."""

    def __init__(self, files: Sequence[str], *, cut: bool) -> None:
        self.files, self.cut = files, cut
        self.crop = v2.RandomResizedCrop(SIDE, antialias=True)

    def __len__(self) -> int:
        return len(self.files) // BATCH

    def __getitem__(self, batch: int) -> int:
        for file in self.files[batch * BATCH : (batch + 1) * BATCH]:
            image = read_image(Path(file), file)
            if self.cut:
                self.crop(image), self.crop(image)
        return batch


class Two:
    """Torchvision's two views of an image, uint8 (3, S, S)."""

    def __init__(self) -> None:
        self.view = v2.Compose(
            [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        )

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the views."""
        return self.view(image), self.view(image)


def epochs(loader: DataLoader[Any]) -> Call:
    """Return a call that reads a whole epoch. The workers live on."""

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


class Usage(NamedTuple):
    """What processes use."""

    megabytes: float
    """The largest memory of a worker."""
    files: int
    """Open files of the trainer and the workers together."""


class Ours:
    """Reads an epoch of our DataModule at each call. `before` is called first.

    `usages` holds what the workers used after each call.
    """

    def __init__(self, *words: str, workers: int, before: Call | None = None) -> None:
        chosen = ["augment=imagenet", "dataset.image_size=224", "dataset.resident_size=0", *words]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            settings = check(compose("config", overrides=chosen))
        data = DataModule(
            build(settings.dataset),
            build(settings.augment),
            None,
            batch_size=BATCH,
            num_workers=workers,
            seed=0,
            channels_last=True,
            whole_images=False,
        )
        assert isinstance(data.dataset.train, FileSplit)
        data.trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
        )
        self.loader, self.before, self.epochs = data.train_dataloader(), before, count()
        self.usages: list[Usage] = []

    def __call__(self) -> None:
        """Read an epoch."""
        if self.before is not None:
            self.before()
        self.loader.batches.epoch = next(self.epochs)
        for batch in self.loader.loader:
            if isinstance(batch, Exception):
                raise batch
            batch.as_tensors().unshared()
        workers = [worker.pid for worker in self.loader.loader._iterator._workers]  # type: ignore[union-attr]
        files = sum(len(os.listdir(f"/proc/{process}/fd")) for process in (os.getpid(), *workers))
        self.usages.append(Usage(max(map(own_memory, workers)), files))


def own_memory(process: int) -> float:
    """Return the memory that a process does not share with the one that forked it, in MB."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(size) for name, size, *_ in (line.split() for line in lines)}
    return (sizes["Private_Dirty:"] + sizes["Pss_Shmem:"]) / 1e3


def table(root: Path, to: Path) -> None:
    """Write the images as a table of the library `datasets`."""
    library = import_module("datasets")
    library.disable_progress_bars()
    files = sorted((root / "train").rglob("*.jpg"))
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [0, 1] * (len(files) // 2),
    }
    features = library.Features(image=library.Image(), label=library.ClassLabel(names=["a", "b"]))
    library.DatasetDict(
        train=library.Dataset.from_dict(columns, features=features),
        test=library.Dataset.from_dict({name: rows[:2] for name, rows in columns.items()}, features=features),
    ).save_to_disk(to)


@contextmanager
def store(shards: Path) -> Iterator[str]:
    """Put the shards into moto's S3 on this machine, and yield their URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        fs = import_module("s3fs").S3FileSystem(skip_instance_cache=True)
        fs.mkdir("images")
        for file in shards.iterdir():
            fs.put_file(str(file), f"images/{file.name}")
        yield "s3://images"
    finally:
        server.kill()
        server.wait()


@contextmanager
def peers(python: str, shards: Path, folder: Path, workers: int) -> Iterator[dict[str, Call]]:
    """Start the peers in their own environment, and yield a call for each."""
    words = [python, str(PEERS), str(shards), str(folder), str(workers), str(BATCH), str(SIDE)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    lines, answers = process.stdin, process.stdout

    def ask(name: str) -> None:
        lines.write(f"{name}\n")
        lines.flush()
        if answers.readline().strip() != name:
            raise RuntimeError(f"{name} failed")

    try:
        yield {name: lambda name=name: ask(name) for name in answers.readline().strip().split(", ")}  # type: ignore[misc]
    finally:
        lines.close()  # which ends them, but for workers that wait for each other
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(words: Sequence[str] | None = None) -> None:
    """Measure all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--peers", metavar="PYTHON", help="the interpreter of the peers' environment")
    parser.add_argument("--tiny", action="store_true", help="one round of one batch and one worker, without S3")
    options = parser.parse_args(words)
    if options.tiny:
        options.images, options.rounds, options.workers = BATCH, 1, 1
    options.images -= options.images % BATCH
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning_fabric")
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures(base / "folder", options.images)
        folder = ["dataset=imagefolder", f"dataset.root={base / 'folder'}"]
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            node = check(compose("config", overrides=[*folder, "dataset.resident_size=0"])).dataset
        dataset = build(node)
        (base / "shards").mkdir()
        write(dataset, Options(str(base / "shards"), 32 if options.tiny else 128, None, 90), base / "shards")
        table(base / "folder", base / "table")
        files = dataset.train.files
        keys: dict[str, Any] = {"num_workers": options.workers, "persistent_workers": True}
        together: dict[str, Any] = {"batch_size": BATCH, "shuffle": True, "drop_last": True}
        work: dict[str, Call] = {
            "bare: decode and cut": epochs(DataLoader(Bare(files, cut=True), batch_size=None, **keys)),
            "bare: decode": epochs(DataLoader(Bare(files, cut=False), batch_size=None, **keys)),
            "ours, folder": Ours(*folder, workers=options.workers),
            "ours, shards": Ours("dataset=shards", f"dataset.url={base / 'shards'}", workers=options.workers),
            "ours, Hugging Face": Ours(
                "dataset=huggingface", f"dataset.name={base / 'table'}", workers=options.workers
            ),
            "torchvision": epochs(DataLoader(ImageFolder(str(base / "folder/train"), Two()), **keys, **together)),
        }
        if not options.tiny:
            url = stack.enter_context(store(base / "shards"))
            caches = {name: f"dataset.cache={base / name}" for name in ("emptied", "kept")}
            remote = ["dataset=shards", f"dataset.url={url}"]

            def empty() -> None:
                shutil.rmtree(base / "emptied/shards", ignore_errors=True)

            work["ours, S3, empty cache"] = Ours(*remote, caches["emptied"], workers=options.workers, before=empty)
            work["ours, S3, full cache"] = Ours(*remote, caches["kept"], workers=options.workers)
        if options.peers:
            work |= stack.enter_context(peers(options.peers, base / "shards", base / "folder", options.workers))
        seconds = alternate(work, rounds=options.rounds, limit=options.seconds)
        used = {name: call.usages for name, call in work.items() if isinstance(call, Ours)}
        print_table(options.images, options.workers, seconds, used)


def print_table(
    images: int, workers: int, seconds: Mapping[str, Sequence[float]], used: Mapping[str, Sequence[Usage]]
) -> None:
    """Print images per second, the ratio to the first row, and what our workers used."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    made = io.StringIO()
    shown = Table(title=f"{images} images of {HEIGHT} x {WIDTH}, two views of {SIDE} px, {workers} workers")
    for column in ("source", "images/s", "ratio to the first", "MB a worker", "growth", "open files", "growth"):
        shown.add_column(column, justify="left" if column == "source" else "right")
    for name, median in medians.items():
        cells = [f"{images / median:,.0f}", f"{first / median:.2f}"]
        if name in used:
            begin, end = used[name][:2][-1], used[name][-1]
            cells += [f"{end.megabytes:.0f}", f"{end.megabytes - begin.megabytes:+.0f}"]
            cells += [str(end.files), f"{end.files - begin.files:+d}"]
        shown.add_row(name, *cells)
    Console(file=made, width=120).print(shown)
    print(made.getvalue())


if __name__ == "__main__":
    main()
