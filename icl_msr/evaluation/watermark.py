"""Accuracy under a translucent mark that is drawn over the images.

Li et al., A Whac-A-Mole dilemma: shortcuts come in multiples where mitigating one amplifies others, CVPR 2023, made
ImageNet-W: a watermark over the middle of the images lowers the accuracy, and draws predictions to one class, which
bears such marks in the training images. Our mark consists of strokes of our own, which are not a script. A probe on
frozen features classifies.

N images of S x S pixels, with values from 0 to 255.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.records import GAP, Layout, Measurement
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.subsets import Changed, Some
from icl_msr.evaluation.suite import Evaluation, Fit, Results, Task, gap, keep_predictions, named_split, record_accuracy

WATERMARK = Layout(
    kind="watermark",
    title="Predictions that a mark draws to one class, points",
    rows=("classifier", "encoder"),
    labels={"drawn": "more often predicted"},
    about="The class whose share of the predictions grows most with the mark. It is chosen on half of the images, and "
    "its growth is measured on the others.",
    count="images",
    notes="class",
)
STROKES = (
    ((0.10, 0.15, 0.90, 0.15), (0.50, 0.15, 0.50, 0.90), (0.10, 0.50, 0.90, 0.50), (0.15, 0.90, 0.85, 0.90)),
    ((0.15, 0.10, 0.15, 0.90), (0.15, 0.10, 0.85, 0.10), (0.85, 0.10, 0.85, 0.90), (0.15, 0.60, 0.85, 0.35)),
    ((0.50, 0.05, 0.10, 0.55), (0.50, 0.05, 0.90, 0.55), (0.25, 0.55, 0.75, 0.55), (0.50, 0.30, 0.50, 0.95)),
)
"""The strokes (x0, y0, x1, y1) of the three signs of the mark, each in a square with sides of length 1."""
THICKNESS = 0.11
"""Thickness of a stroke, as a part of a sign's height."""


@dataclass(kw_only=True)
class Watermark(Evaluation):
    """Classifiers fitted on clean training images, tested on images with a translucent white mark in the middle.

    Config keys: those of `suite.Evaluation`. `opacity` is that of the mark, and `height` the part of the image's height
    that it takes. `images` is the largest number of test images, spread evenly over the split. `split` names the test
    split; null is the first.
    """

    opacity: Annotated[float, Field(gt=0, le=1)]
    height: Annotated[float, Field(gt=0, le=0.33)]
    images: PositiveInt
    split: str | None

    @override
    def names(self, dataset: Dataset) -> list[str]:
        require_labels(dataset)
        named_split(dataset, self.split)
        return [f"{classifier}/train/{split}" for classifier in self.classifiers for split in ("clean", "marked")]

    @override
    def measure(self, task: Task, results: Results) -> None:
        split = task.dataset.tests[named_split(task.dataset, self.split)]
        train = task.dataset.train
        clean = Some(split, torch.linspace(0, len(split) - 1, min(self.images, len(split))).round().long())

        def mark(images: Tensor, index: Tensor) -> Tensor:
            return marked(images, self.opacity, self.height)

        about = f"marked {self.opacity} {self.height}"
        shown: dict[str, Split] = {"clean": clean, "marked": Changed(clean, mark, about, task.device)}
        bank = task.features(train, "train images")
        tests = {part: task.features(images, f"{part} images") for part, images in shown.items()}
        for fit, scores in self.scores(task, "train", bank, train.labels, tests, results):
            predicted = {part: values.argmax(1) for part, values in scores.items()}
            for part, values in scores.items():
                keep_predictions(fit, part, predicted[part], clean.labels, results)
                record_accuracy(task, fit, part, values, clean.labels, results)
            hits = {part: found == clean.labels for part, found in predicted.items()}
            lost = task.bootstrap.difference(hits["clean"], hits["marked"], paired=True)
            results.records.add(GAP, gap(fit, "clean", "marked", lost))
            if len(clean) > 1:
                results.records.add(WATERMARK, drawn(task, fit, predicted["clean"], predicted["marked"]))


def drawn(task: Task, fit: Fit, clean: Tensor, marked: Tensor) -> Measurement:
    """Return the growth, in points, of the class whose share of the predictions (n,) grows most with the mark."""
    classes = task.dataset.classes
    counts = [torch.bincount(predicted[::2], minlength=len(classes)) for predicted in (clean, marked)]
    most = int((counts[1] - counts[0]).argmax())
    grown = task.bootstrap.difference(marked[1::2] == most, clean[1::2] == most, paired=True)
    points = {key: 100 * value for key, value in grown._asdict().items()}
    record = partial(Measurement, kind=WATERMARK.kind, metric="drawn", unit="points", better="less")
    return record(n=len(clean) // 2, note=classes[most], **points, **fit._asdict())


def marked(images: Tensor, opacity: float, height: float) -> Tensor:
    """Draw the mark over the middle of images (N, 3, S, S): white, with this opacity and part of the image's height."""
    cover = opacity * mark(images.shape[-1], height).to(images.device)
    return images.float() * (1 - cover) + 255 * cover


@lru_cache
def mark(size: int, height: float) -> Tensor:
    """Return the part of each pixel that the mark covers: float32 (S, S) in [0, 1], with smooth edges.

    The signs stand side by side, in the middle of the image.
    """
    pixels = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    cover = torch.zeros(size, size)
    for place, sign in enumerate(STROKES):
        # Of this sign, in units of its height: (0, 0) is its upper left corner.
        u = (x - 0.5) / height + len(STROKES) / 2 - place
        v = (y - 0.5) / height + 0.5
        for x0, y0, x1, y1 in sign:
            along = ((u - x0) * (x1 - x0) + (v - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)
            along = along.clamp(0, 1)
            distance = torch.hypot(u - x0 - along * (x1 - x0), v - y0 - along * (y1 - y0))
            cover = cover.maximum(((THICKNESS / 2 - distance) * height * size + 0.5).clamp(0, 1))
    return cover
