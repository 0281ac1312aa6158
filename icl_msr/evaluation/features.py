"""Images in, features out: the only part of the evaluation that runs an encoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from icl_msr.data.dataset import Split, normalise
from icl_msr.errors import UserError

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
) -> Tensor:
    """Pooled features of the whole, un-augmented images of `split`, float32 (N, c) on the CPU, in the split's order.

    `encoder` maps normalised float images (n, 3, S, S) to (n, c). It runs in evaluation mode and without gradients; it
    is moved to `device` and otherwise left as it was found. `index` (N,) picks images, all of them by default;
    `autocast` is the precision of the forward pass, float32 by default; `label` names the progress bar.

    Raises:
        UserError: a feature is not finite.
    """
    device = torch.device(device)
    index = torch.arange(len(split)) if index is None else index.cpu()
    encoder.to(device)
    features = torch.empty(0)
    with evaluating(encoder), torch.inference_mode(), _progress(label, len(index)) as bar:
        for start in range(0, len(index), batch_size):
            chosen = index[start : start + batch_size]
            images = normalise(split.load(chosen).to(device, non_blocking=True), mean, std)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                pooled = encoder(images.to(memory_format=torch.channels_last))
            if start == 0:
                # An ordinary tensor, not an inference one, so that a probe may train on it.
                with torch.inference_mode(False):
                    features = torch.empty(len(index), pooled.shape[1])
            features[start : start + len(chosen)] = pooled
            bar.advance(len(chosen))
    if not features.isfinite().all():
        raise UserError(
            f"The encoder gives features that are not finite ({label}), so nothing can be measured: "
            "the training diverged; lower the learning rate with optimizer.lr=..."
        )
    return features


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is back in the mode it was in."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Bar:
    """A progress bar that shows itself only when the work turns out to be long."""

    def __init__(self, label: str, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task(label, total=total, rate=0.0)
        self.began, self.done = monotonic(), 0

    def advance(self, images: int) -> None:
        self.done += images
        elapsed = monotonic() - self.began
        if elapsed > _PATIENCE and not self.progress.live.is_started:
            self.progress.start()
        self.progress.update(self.task, advance=images, rate=self.done / max(elapsed, 1e-9))


@contextmanager
def _progress(label: str, total: int) -> Iterator[_Bar]:
    bar = _Bar(label, total)
    try:
        yield bar
    finally:
        if bar.progress.live.is_started:
            bar.progress.stop()
