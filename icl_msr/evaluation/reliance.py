"""What features rely on: the accuracy when one cue is taken from the images, relative to the clean accuracy.

Burgert et al., ImageNet-trained CNNs are not biased towards texture: revisiting feature reliance through controlled
suppression, NeurIPS 2025. Their code resizes images to 224 pixels and has these suppressions: grids of 2 to 16 tiles a
side whose tiles are shuffled (global shape) or turned by multiples of 90 degrees (local shape); the bilateral filter of
OpenCV with diameters of 4 to 14 pixels, colour sigmas of 50 to 200 and a spatial sigma of 75, or a Gaussian blur with
sigmas of 0.33 to 2.33 pixels (texture); gray values, or shuffled colour channels (colour). The silhouette, which leaves
the outline alone, is that of Geirhos et al., ICLR 2019. Three things are ours: settings are in pixels of the image at
hand, shuffled channels never stay in place, and a probe on frozen features classifies.

N images of S x S pixels, with values from 0 to 255.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.augment.colour import luma
from icl_msr.augment.geometry import blurring, separable
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys, uniforms
from icl_msr.core.records import Chart, Layout, Measurement
from icl_msr.data.crops import boxes_around
from icl_msr.data.dataset import Dataset, Split
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.metrics import Interval
from icl_msr.evaluation.strata_maps import masks_of
from icl_msr.evaluation.subsets import Changed, Some
from icl_msr.evaluation.suite import (
    Evaluation,
    Fit,
    Results,
    Task,
    keep_predictions,
    named_split,
    record_accuracy,
)

Grid = Annotated[int, Field(ge=2)]
Change = Callable[[Tensor, Tensor], Tensor]
"""A function of float images (N, 3, S, S) and their numbers (N,) that returns images."""
_VIEW = -300
"""View number of the random keys of these images."""
ORDERS = torch.tensor([[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
"""The orders of three channels other than their own."""

RELIANCE = Layout(
    kind="reliance",
    title="Reliance on cues: accuracy without them, relative to the clean accuracy, %",
    rows=("cue", "classifier", "encoder"),
    labels={"relative": "relative accuracy", "accuracy": "accuracy"},
    count="images",
    about="Means over the suppressions of a cue. At 100, the features do without the cue.",
)
SUPPRESSION = Layout(
    kind="suppression",
    title="Each suppression of a cue, %",
    rows=("cue", "suppression", "classifier"),
    columns=("encoder", "metric"),
    labels={"relative": "relative"},
    chart=Chart(
        axis="suppression",
        series=("classifier", "encoder"),
        where={"metric": "relative"},
        note="Accuracy relative to the clean accuracy. Bars are 95 % intervals over images.",
    ),
)


class Suppression(NamedTuple):
    """A change to images that takes one cue away."""

    cue: str
    change: Change


@dataclass(kw_only=True)
class Reliance(Evaluation):
    """Classifiers fitted on clean training images, tested on images without one of their cues.

    Config keys: those of `suite.Evaluation`. `shuffled` and `rotated` are numbers of tiles along a side. `blur` holds
    sigmas, and `bilateral` pairs (diameter, sigma of the colours), in pixels and levels of 255. `images` is the largest
    number of test images, spread evenly over the split. `split` names the test split; null is the first. Silhouettes
    are shown where the split has masks that are not mere boxes. The run's seed decides the random changes, which are
    the same for all encoders.
    """

    shuffled: list[Grid]
    rotated: list[Grid]
    blur: list[PositiveFloat]
    bilateral: list[tuple[PositiveInt, PositiveFloat]]
    images: PositiveInt
    split: str | None

    def suppressions(self, split: Split, seed: int) -> dict[str, Suppression]:
        """Return the suppressions by name, in the order of the tables."""
        found = {}
        for grid in self.shuffled:
            found[f"shuffled {grid} x {grid}"] = Suppression("global shape", partial(shuffled, grid=grid, seed=seed))
        for grid in self.rotated:
            found[f"rotated {grid} x {grid}"] = Suppression("local shape", partial(rotated, grid=grid, seed=seed))
        for sigma in self.blur:
            found[f"blur {sigma:g}"] = Suppression("texture", partial(blurred, sigma=sigma))
        for diameter, sigma in self.bilateral:
            found[f"bilateral {diameter}, {sigma:g}"] = Suppression(
                "texture", partial(bilateral, diameter=diameter, colours=sigma)
            )
        found["gray"] = Suppression("colour", gray)
        found["shuffled channels"] = Suppression("colour", partial(shuffled_channels, seed=seed))
        if outlined(split):
            found["silhouette"] = Suppression("everything but the outline", partial(silhouettes, split=split))
        return found

    @override
    def names(self, dataset: Dataset) -> list[str]:
        require_labels(dataset)
        name = named_split(dataset, self.split)
        largest = max([*self.shuffled, *self.rotated, 0])
        if largest > dataset.image_size:
            raise UserError(
                f"A grid of {largest} x {largest} tiles needs images of {largest} pixels or more, and they have "
                f"{dataset.image_size}; set evaluation.shuffled and evaluation.rotated to smaller ones."
            )
        cues = dict.fromkeys(one.cue for one in self.suppressions(dataset.tests[name], 0).values())
        relative = [f"reliance/relative/{one}/train/{name}/{cue}" for one in self.classifiers for cue in cues]
        return [*(f"{one}/train/clean" for one in self.classifiers), *relative]

    @override
    def measure(self, task: Task, results: Results) -> None:
        name = named_split(task.dataset, self.split)
        split, train = task.dataset.tests[name], task.dataset.train
        clean = Some(split, torch.linspace(0, len(split) - 1, min(self.images, len(split))).round().long())
        chosen = self.suppressions(split, task.seed)
        shown: dict[str, Split] = {"clean": clean}
        for suppression, (_, change) in chosen.items():
            shown[suppression] = changed(clean, change, f"{suppression} {task.seed}", task.device)
        bank = task.features(train, "train images")
        tests = {part: task.features(images, f"{part} images") for part, images in shown.items()}
        for fit, scores in self.scores(task, "train", bank, train.labels, tests, results):
            keep_predictions(fit, "clean", scores["clean"].argmax(1), clean.labels, results)
            record_accuracy(task, fit, "clean", scores["clean"], clean.labels, results)
            hits = {part: values.argmax(1) == clean.labels for part, values in scores.items()}
            _record(task, fit, name, {part: one.cue for part, one in chosen.items()}, hits, results)


def _record(
    task: Task, fit: Fit, split: str, cues: Mapping[str, str], hits: Mapping[str, Tensor], results: Results
) -> None:
    """Record accuracies and relative accuracies from correct predictions bool (n,), by suppression and by cue."""
    clean, bootstrap = hits["clean"], task.bootstrap

    def found(kind: str, factors: dict[str, str], parts: list[Tensor]) -> list[Measurement]:
        total = torch.stack(parts).sum(0)  # whole numbers, so that the resampled means are exact
        record = partial(Measurement, kind=kind, split=split, n=len(total), factors=factors, **fit._asdict())
        mean = Interval(*(value / len(parts) for value in bootstrap.mean(total)))
        known = [record(**mean._asdict())]
        if clean.any():
            ratio = Interval(*(value / len(parts) for value in bootstrap.ratio(total, clean)))
            known.append(record(metric="relative", **ratio._asdict()))
        return known

    about = (
        f"{RELIANCE.about} The clean accuracy is that on the split clean; chance is {100 * task.dataset.chance:g} %."
    )
    for cue in dict.fromkeys(cues.values()):
        parts = [hits[suppression] for suppression, own in cues.items() if own == cue]
        results.records.add(replace(RELIANCE, about=about), *found(RELIANCE.kind, {"cue": cue}, parts))
    for suppression, cue in cues.items():
        factors = {"cue": cue, "suppression": suppression}
        results.records.add(SUPPRESSION, *found(SUPPRESSION.kind, factors, [hits[suppression]]))


def changed(images: Some, change: Change, about: str, device: torch.device) -> Changed:
    """Return a split of changed images. `change` gets the images' numbers in the split that they are some of."""
    return Changed(
        images, lambda shown, index: change(shown.float(), images.index.to(index.device)[index]), about, device
    )


def shuffled(images: Tensor, index: Tensor, grid: int, seed: int) -> Tensor:
    """Cut images into `grid` x `grid` tiles and put these in a random order, which differs from image to image."""
    order = uniforms(keys(seed, 0, index, _VIEW), grid**2).argsort(1)
    return _on_tiles(images, grid, lambda tiles: tiles[torch.arange(len(tiles), device=tiles.device)[:, None], order])


def rotated(images: Tensor, index: Tensor, grid: int, seed: int) -> Tensor:
    """Cut images into `grid` x `grid` tiles and turn each by a random multiple of 90 degrees."""
    turns = (uniforms(keys(seed, 0, index, _VIEW - 1), grid**2) * 4).long()[:, :, None, None, None]

    def turn(tiles: Tensor) -> Tensor:
        for quarter in (1, 2, 3):
            tiles = tiles.where(turns < quarter, tiles.rot90(dims=(3, 4)))
        return tiles

    return _on_tiles(images, grid, turn)


def _on_tiles(images: Tensor, grid: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the tiles (N, grid^2, 3, s, s) of images, which are enlarged to a multiple of `grid` for it if needed."""
    n, _, size, _ = images.shape
    side = -(-size // grid)
    if side * grid != size:
        images = F.interpolate(images, (side * grid, side * grid), mode="bilinear")
    tiles = images.view(n, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).reshape(n, grid**2, 3, side, side)
    tiles = change(tiles).view(n, grid, grid, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    images = tiles.reshape(n, 3, side * grid, side * grid)
    return images if side * grid == size else F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def blurred(images: Tensor, index: Tensor, sigma: float) -> Tensor:
    """Blur images with a Gaussian of `sigma` pixels."""
    matrix = blurring(torch.full((len(images),), sigma, device=images.device), images.shape[-1])
    return separable(images, matrix, matrix)


def bilateral(images: Tensor, index: Tensor, diameter: int, colours: float, space: float = 75.0) -> Tensor:
    """Apply the bilateral filter as OpenCV defines it: each pixel becomes a weighted mean of those around it.

    The pixels lie in a disc of radius `diameter // 2`, at least 1. A weight is a Gaussian of the distance, with sigma
    `space`, times a Gaussian of the sum of the three absolute differences, with sigma `colours`. Borders are mirrored.
    """
    radius, size = max(1, diameter // 2), images.shape[-1]
    radius = min(radius, size - 1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:, :1])
    for down in range(-radius, radius + 1):
        for across in range(-radius, radius + 1):
            distance = down**2 + across**2
            if distance > radius**2:
                continue
            top, left = radius + down, radius + across
            other = padded[:, :, top : top + size, left : left + size]
            apart = (other - images).abs().sum(1, keepdim=True)
            weight = torch.exp(-distance / (2 * space**2) - apart.square() / (2 * colours**2))
            total += weight * other
            weights += weight
    return total / weights


def gray(images: Tensor, index: Tensor) -> Tensor:
    """Return gray images."""
    return luma(images)[:, None].expand_as(images)


def shuffled_channels(images: Tensor, index: Tensor, seed: int) -> Tensor:
    """Put the colour channels of each image in another order."""
    chosen = (uniforms(keys(seed, 0, index, _VIEW - 2), 1)[:, 0] * len(ORDERS)).long()
    order = ORDERS.to(images.device)[chosen]
    return images[torch.arange(len(images), device=images.device)[:, None], order]


def silhouettes(images: Tensor, index: Tensor, split: Split) -> Tensor:
    """Return the objects as black silhouettes on white."""
    masks = masks_of(split, index.cpu())
    assert masks is not None
    return (~masks[:, None]).to(images).expand_as(images) * 255


def outlined(split: Split) -> bool:
    """Return whether a split has masks that show the outline of objects. A mask made from a box shows none.

    The first hundred images decide.
    """
    masks = masks_of(split, torch.arange(min(100, len(split))))
    if masks is None:
        return False
    x0, y0, x1, y1 = boxes_around(masks).unbind(1)
    return bool((masks.sum((1, 2)) != (x1 - x0) * (y1 - y0)).any())
