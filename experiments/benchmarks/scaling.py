"""Measure how training scales over ranks, and how an index scales with the data.

python -m experiments.benchmarks.scaling [ranks] [wire] [index] [--steps 20] [--tiny]

* ranks: weak scaling of SimCLR with the tiny backbone in fp32, a fixed number of images for each of 1 and 2 gloo ranks
  of one core each. Rounds alternate. The efficiency is the time of a step of 1 rank by that of 2 (aim .9);
* wire: bytes that a rank hands to collectives in a step of every method on 2 ranks: the gradients, the rows that it
  gathers (embeddings, and BatchNorm's statistics of each rank) with the gradients of these, and other sums; the number
  of messages; and the bytes that a ring sends for them, by the fewest that are possible. Ours gathers rows as a sum
  with zeros, for exact derivatives of every order, and that sends each row twice;
* index: seconds and memory as the index grows from 10^4 to 10^7 images: paths, the order of an epoch, labels, what the
  record of a run says of them, and the bytes that a worker that is not forked receives.
"""

import argparse
import pickle
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from experiments.benchmarks.timing import peak_memory, stopwatch
from icl_msr.core import distributed
from icl_msr.core.config import build, check, config_dir
from icl_msr.core.views import Views
from icl_msr.data.dataset import Dataset
from icl_msr.data.files import FileSplit
from icl_msr.methods import Method, Step
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.training.datamodule import EpochBatches

PARTS = ("ranks", "wire", "index")


class Loss(nn.Module):
    """The training loss as DDP wraps it."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, views: Views, now: Step) -> Any:
        """Return the output of the method."""
        return self.method(views, self.method.targets(views), now)


def training(name: str, images: int) -> Callable[[], None]:
    """Return a step of a method on this rank's images, without a loader."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = check(compose("config", [f"method={name}", "regularizer=none"]))
    torch.manual_seed(0)
    facts: dict[str, Any] = {"classes": 10, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    method: Method = build(settings.method, backbone=build(settings.backbone, image_size=32), **facts)
    count = {"cmc": 1, "supervised": 1, "random": 1}.get(name, 2)
    loss: nn.Module = Loss(method.to(memory_format=torch.channels_last))
    if distributed.world_size() > 1:
        loss = DistributedDataParallel(Loss(global_batch_norm(method)), broadcast_buffers=False)
        loss.register_comm_hook(None, _counted_bucket)
    adam = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], 1e-3)
    whole, *pictures = torch.randn(1 + count, images, 3, 32, 32).unbind()
    index = torch.arange(images) + images * distributed.rank()
    views, now = Views(whole, pictures, index, index % 10), Step(0, 10)

    def step() -> None:
        output = loss(views, now)
        adam.zero_grad()
        output.loss.backward()
        adam.step()
        method.advance(now)

    return step


BYTES: Counter[str] = Counter()
"""Bytes that this rank has handed to collectives, by what they are."""


def _counted_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    BYTES.update(gradients=bucket.buffer().nbytes, messages=1)
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def _count() -> None:
    """Count what this rank sums over ranks from now on."""
    total, gathered = distributed._sum_over_ranks, distributed.all_reduce_sum

    def counted(local: Tensor) -> Tensor:
        BYTES.update(sums=local.nbytes, messages=1)
        return total(local)

    def counted_rows(local: Tensor) -> Tensor:
        BYTES.update(gathered=local.nbytes * (1 + local.requires_grad))  # the backward pass sums as many
        return gathered(local)

    distributed._sum_over_ranks = counted
    distributed.all_reduce_sum = counted_rows  # as `gather` calls it


def _serve(rank: int, size: int, store: str, work: tuple[str, Sequence[str], int, int], answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    kind, methods, images, steps = work
    if kind == "wire":
        _count()
    found: dict[str, Any] = {}
    for name in methods:
        step = training(name, images)
        step()
        BYTES.clear()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        found[name] = dict(BYTES) if kind == "wire" else (time.perf_counter() - began) / steps
    if rank == 0:
        answers.put(found)
    dist.barrier()


def run(kind: str, size: int, methods: Sequence[str], images: int, steps: int) -> dict[str, Any]:
    """Return what rank 0 of `size` processes finds for each method."""
    context = get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        work = (kind, methods, images, steps)
        arguments = (size, f"file://{folder}/store", work, answers)
        processes = [context.Process(target=_serve, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a rank ended with {[process.exitcode for process in processes]}")
    found: dict[str, Any] = answers.get()
    return found


def ranks(steps: int, images: int, rounds: int) -> Table:
    """Return the table of weak scaling."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for size, taken in seconds.items():
            taken.append(run("ranks", size, ["simclr"], images, steps)["simclr"])
    medians = {size: statistics.median(taken) for size, taken in seconds.items()}
    table = Table("ranks", "ms a step", "images/s", "efficiency", title=f"Weak scaling, {images} images a rank")
    for size, median in medians.items():
        speed, efficiency = size * images / median, medians[1] / median
        table.add_row(str(size), f"{1e3 * median:.1f}", f"{speed:,.0f}", f"{efficiency:.2f}")
    return table


def wire(methods: Sequence[str], images: int) -> Table:
    """Return the table of bytes on the wire."""
    size = 2
    found = run("wire", size, methods, images, 1)
    head = ("method", "gradients", "gathered", "summed", "messages", "sent", "by the fewest")
    table = Table(*head, title=f"Bytes of a step, 2 ranks, {images} images each, tiny backbone")
    for name, counts in found.items():
        gradients, gathered = counts.get("gradients", 0), counts.get("gathered", 0)
        summed = counts.get("sums", 0) - gathered
        ring = 2 * (size - 1) / size
        sent = ring * (gradients + gathered + summed)
        fewest = ring * (gradients + gathered / 2 + summed)
        cells = (gradients, gathered, summed, counts.get("messages", 0), sent)
        table.add_row(name, *(f"{value:,.0f}" for value in cells), f"{sent / max(fewest, 1):.3f}")
    return table


def index(counts: Sequence[int]) -> Table:
    """Return the table of an index of n images."""
    head = ("images", "what", "seconds", "MB at the peak")
    table = Table(*head, title="The index of a data set of files")
    for count in counts:
        labels = torch.arange(count) % 1000
        made: dict[str, Any] = {}

        def split(count: int = count, labels: Tensor = labels, made: dict[str, Any] = made) -> None:
            files = [f"/data/train/n{i % 1000:08d}/n{i:010d}.JPEG" for i in range(count)]
            made["split"] = FileSplit(files, labels, 224)

        def data(made: dict[str, Any] = made) -> None:
            classes = [f"n{k:08d}" for k in range(1000)]
            dataset = Dataset("made", classes, 224, made["split"], {"test": made["split"]})
            dataset.remarks()
            dataset.trained_on()

        def copy(made: dict[str, Any] = made) -> None:
            made["bytes"] = len(pickle.dumps(made["split"]))

        work: dict[str, Callable[[], object]] = {
            "paths, as listed": split,
            "checks and record": data,
            "order of an epoch": partial(next, iter(EpochBatches(count, min(256, count), 0))),
            "a worker's copy": copy,
        }
        for name, call in work.items():
            taken: list[float] = []
            peak = peak_memory(lambda call=call, taken=taken: taken.append(stopwatch(call)))  # type: ignore[misc]
            more = f" ({made['bytes'] / 2**20:,.1f} MB sent)" if "copy" in name else ""
            table.add_row(f"{count:,}", name + more, f"{taken[0]:.2f}", "" if peak is None else f"{peak:,.0f}")
        table.add_section()
    return table


def main(words: Sequence[str] | None = None) -> None:
    """Measure the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="one step of few images, to see that it runs")
    options = parser.parse_args(words)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{min(unknown)} is not a part; take {', '.join(PARTS)}")
    parts, console = options.parts or PARTS, Console(width=110)
    methods = sorted(file.stem for file in (Path(config_dir()) / "method").glob("*.yaml"))
    left_out = {"random", "supervised", "supcon", "dino", "swav", "cmc"}
    if "ranks" in parts:
        console.print(ranks(1 if options.tiny else options.steps, 8 if options.tiny else 128, 1 if options.tiny else 5))
    if "wire" in parts:
        chosen = ["simclr"] if options.tiny else [name for name in methods if name not in left_out]
        console.print(wire(chosen, 8 if options.tiny else 128))
    if "index" in parts:
        console.print(index((1000,) if options.tiny else (10**4, 10**5, 10**6, 10**7)))


if __name__ == "__main__":
    main()
