"""Extraction of features, the part of the evaluation that runs the encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from icl_msr.core.distributed import rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.terminal import progress_bar
from icl_msr.data.dataset import Split, normalise
from icl_msr.models.backbones import evaluating

_PATIENCE = 2.0
"""Seconds of silence before a progress bar appears."""


def extract(
    encoder: nn.Module,
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int,
    label: str = "features",
    index: Tensor | None = None,
    autocast: torch.dtype | None = None,
    over_ranks: bool = False,
) -> Tensor:
    """Return the pooled features of the un-augmented images of `split`, float32 (N, c) on the CPU, in the same order.

    `encoder` maps normalised float images (n, 3, S, S) to (n, c). It runs in evaluation mode and without gradients. It
    is moved to `device` and otherwise not changed. `index` (N,) selects images, by default all. `autocast` is the
    precision of the forward pass, by default float32. `label` names the progress bar. `over_ranks` shares the work with
    the other ranks, which must all make the same call. The batches are those of a single process, and so are the
    features, bit for bit.

    Raises:
        UserError: a feature is not finite.
    """
    device = torch.device(device)
    index = torch.arange(len(split)) if index is None else index.cpu()
    encoder.to(device)
    starts = range(0, len(index), batch_size)
    if over_ranks:
        starts = starts[rank() * len(starts) // world_size() : (rank() + 1) * len(starts) // world_size()]
    rows = []
    with evaluating(encoder), torch.inference_mode(), progress(label, len(starts) * batch_size) as bar:
        for start in starts:
            chosen = index[start : start + batch_size]
            images = normalise(split.load(chosen).to(device, non_blocking=True), mean, std)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                pooled = encoder(images.to(memory_format=torch.channels_last))
            rows.append(pooled.float().cpu())
            bar.advance(len(chosen))
    if over_ranks and world_size() > 1:
        everyone: list[Any] = [None] * world_size()
        dist.all_gather_object(everyone, rows)
        rows = [batch for of_rank in everyone for batch in of_rank]
    features = torch.cat(rows)  # an ordinary tensor, not an inference one, so that a probe may train on it
    if not features.isfinite().all():
        raise UserError(
            f"The encoder gives features that are not finite ({label}), so nothing can be measured: "
            "the training diverged; lower the learning rate with optimizer.lr=..."
        )
    return features


class Bar:
    """A progress bar with images per second and time left, which appears only if the work takes long."""

    def __init__(self, label: str, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
        )
        self.progress = progress_bar(*columns)
        self.task = self.progress.add_task(label, total=total, rate=0.0)
        self.began, self.done = monotonic(), 0

    def advance(self, images: int) -> None:
        """Add a number of finished images."""
        self.done += images
        elapsed = monotonic() - self.began
        if elapsed > _PATIENCE and not self.progress.live.is_started:
            self.progress.start()
        self.progress.update(self.task, advance=images, rate=self.done / max(elapsed, 1e-9))


@contextmanager
def progress(label: str, total: int) -> Iterator[Bar]:
    """Yield a progress bar for `total` images."""
    bar = Bar(label, total)
    try:
        yield bar
    finally:
        if bar.progress.live.is_started:
            bar.progress.stop()
