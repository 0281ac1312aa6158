"""Grids of images for the report: views, negatives, strata and nearest neighbours."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from icl_msr.data.dataset import Dataset
from icl_msr.encoders import Backbone
from icl_msr.evaluation.features import evaluating
from icl_msr.evaluation.knn import neighbours
from icl_msr.views import Views

matplotlib.rcParams["svg.fonttype"] = "none"


def views_grid(views: Views, mean: Sequence[float], std: Sequence[float], path: Path, images: int = 10) -> str:
    """The un-augmented image and its views, one column an image. Writes `path`; returns a caption."""
    rows = {"image X": views.images, **{f"view {i}": view for i, view in enumerate(views.views, start=1)}}
    _grid({name: pixels(tensor[:images], mean, std) for name, tensor in rows.items()}, path)
    return "Training images and the independent augmentations that the method compares."


def negatives_grid(views: Views, mean: Sequence[float], std: Sequence[float], path: Path, images: int = 10) -> str:
    """The query and its non-semantic negatives. Writes `path`; returns a caption."""
    assert views.negatives is not None
    rows = {"query": views.views[0][:images]}
    for i, negative in enumerate(views.negatives.rows[:images].unbind(1), start=1):
        rows[f"negative {i}"] = negative
    _grid({name: pixels(tensor, mean, std) for name, tensor in rows.items()}, path)
    return "Queries and their non-semantic negatives: the texture stays, the meaning goes."


@torch.no_grad()
def strata_grid(
    backbone: Backbone, strata: Tensor, images: Tensor, mean: Sequence[float], std: Sequence[float], path: Path
) -> str:
    """Where each stratum looks: the last feature map weighted by a_t, over normalised images (N, 3, H, W).

    `strata` is A(X), (N, S, c), or narrower where several encoders share it, whose maps lie behind one another. A
    stratum's map is scaled to its own largest value in the image. Writes `path`; returns a caption.
    """
    with evaluating(backbone):
        maps = backbone.maps(images).float()  # (N, c, h, w)
    strata = strata.repeat(1, 1, maps.shape[1] // strata.shape[2])
    weighted = torch.einsum("nsc,nchw->nshw", strata, maps.clamp(min=0))
    weighted = weighted / weighted.flatten(2).amax(2).clamp(min=1e-12)[..., None, None]
    weighted = F.interpolate(weighted, images.shape[-2:], mode="bicubic").clamp(0, 1)
    shown = pixels(images, mean, std)
    rows = {"image X": shown}
    for t in range(strata.shape[1]):
        rows[f"stratum {t + 1}"] = (shown, weighted[:, t])  # type: ignore[assignment]
    _grid(rows, path)
    return "What each stratum of f_msr weighs up: the last feature map, weighted by a_t (bright: large)."


def neighbours_grid(
    dataset: Dataset, features: Mapping[str, Tensor], split: str, path: Path, images: int = 10, k: int = 5
) -> str:
    """Test images and the training images whose features are nearest. Writes `path`; returns a caption."""
    test = dataset.tests[split]
    chosen = torch.linspace(0, len(test) - 1, images).long()
    _, nearest = neighbours(features["train"], features[split][chosen], k, normalised=True)
    rows = {split.replace("_", " "): test.load(chosen)}
    for rank in range(k):
        rows[f"nearest {rank + 1}"] = dataset.train.load(nearest[:, rank])
    hits = dataset.train.labels[nearest] == test.labels[chosen][:, None]
    _grid(rows, path, marks={f"nearest {rank + 1}": hits[:, rank] for rank in range(k)})
    return f"Images of the test split {split} and their nearest training images; a green frame marks the same class."


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised float images (N, 3, H, W) back to uint8."""
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    return ((images.float() * scale + shift) * 255).round().clamp(0, 255).byte()


def _grid(
    rows: Mapping[str, Tensor | tuple[Tensor, Tensor]], path: Path, marks: Mapping[str, Tensor] | None = None
) -> None:
    """One row a name, one column an image; a pair of images and maps is drawn as an overlay."""
    columns = max(len(r[0] if isinstance(r, tuple) else r) for r in rows.values())
    figure = Figure(figsize=(columns * 0.9 + 1.1, len(rows) * 0.93), dpi=110)
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    figure.subplots_adjust(left=1.1 / (columns * 0.9 + 1.1), right=0.995, top=0.99, bottom=0.01)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, labelpad=6)
        images, maps = row if isinstance(row, tuple) else (row, None)
        for column, axis in enumerate(line):
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if column >= len(images):
                continue
            image = images[column].permute(1, 2, 0).cpu().numpy()
            if maps is None:
                axis.imshow(image)
            else:
                axis.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=255)
                axis.imshow(maps[column].cpu().numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            if marks and name in marks:
                for spine in axis.spines.values():
                    spine.set(visible=True, color="#009e73" if marks[name][column] else "#bbbbbb", linewidth=2)
    figure.savefig(path)
