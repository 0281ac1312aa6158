"""Pictures for the report: views, negatives, strata, their weights, nearest neighbours and a map of the features."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from icl_msr.core.errors import UserError, reason
from icl_msr.core.figures import Overlays, grid, plain
from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import atomic_write, replacing
from icl_msr.core.views import Views
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.knn import neighbours
from icl_msr.evaluation.strata_maps import ALL, weighted_maps
from icl_msr.models.backbones import Backbone, evaluating
from icl_msr.regularizers.strata import uniform

matplotlib.rcParams["svg.fonttype"] = "none"


def views_grid(views: Views, mean: Sequence[float], std: Sequence[float], path: Path, images: int = 10) -> str:
    """Draw un-augmented images and their views, one image per column. Write `path` and return a caption."""
    rows = {"image X": views.images, **{f"view {i}": view for i, view in enumerate(views.views, start=1)}}
    _grid({name: pixels(tensor[:images], mean, std) for name, tensor in rows.items()}, path)
    return "Training images and the independent augmentations that the method compares."


def negatives_grid(views: Views, mean: Sequence[float], std: Sequence[float], path: Path, images: int = 10) -> str:
    """Draw queries and their non-semantic negatives. Write `path` and return a caption."""
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
    """Draw the last feature map, weighted by each stratum's a_t, over normalised images (N, 3, H, W).

    `strata` is A(X), (N, S, c), or narrower if several encoders share it. The first map weights all channels equally.
    Each map is scaled to its own largest value in the image. Write `path` and return a caption.
    """
    with evaluating(backbone):
        maps = backbone.maps(images).float()  # (N, c, h, w)
    alike = uniform(strata.shape[2]).to(strata).expand(len(strata), 1, -1)
    weighted = weighted_maps(maps, torch.cat([alike, strata], dim=1).float())
    weighted = weighted / weighted.flatten(2).amax(2).clamp(min=1e-12)[..., None, None]
    weighted = F.interpolate(weighted, images.shape[-2:], mode="bicubic").clamp(0, 1)
    shown = pixels(images, mean, std)
    names = [ALL, *(f"stratum {t}" for t in range(1, strata.shape[1] + 1))]
    overlays = {name: (shown, weighted[:, t]) for t, name in enumerate(names)}
    _grid({"image X": shown, **overlays}, path)
    return (
        "The last feature map, weighted by the a_t of each stratum of f_msr (bright: large, each map scaled by "
        "itself), below the map that weights all channels equally."
    )


def weights_figure(strata: Tensor, path: Path) -> str:
    """Draw the distribution of A(X), (N, S, c), of a batch, as sqrt(c) a_t, which is 1 for uniform weights.

    On the left is a histogram over images and channels. On the right is the mean over images, with channels sorted by
    the stratum with the largest weight, then by this weight. Write `path` and return a caption.
    """
    weights = math.sqrt(strata.shape[2]) * strata.detach().float().cpu()
    mean = weights.mean(0)  # (S, c)
    most, owner = mean.max(0)
    order = sorted(range(len(owner)), key=lambda channel: (int(owner[channel]), -float(most[channel])))
    top = max(float(weights.max()), 1.5)
    figure = Figure(figsize=(9.5, 0.25 * max(len(mean), 6) + 1.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for t, values in enumerate(weights.unbind(1)):
        counts = torch.histc(values, 40, 0, top) / values.numel()
        left.stairs(100 * counts.numpy(), torch.linspace(0, top, 41).numpy(), color=f"C{t}", label=f"stratum {t + 1}")
    left.axvline(1, color="#6b7177", lw=1, ls=":")
    left.set(xlabel="sqrt(c) a_t", ylabel="% of weights", xlim=(0, top))
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    shades = right.imshow(mean[:, order].numpy(), aspect="auto", cmap="magma", vmin=0, interpolation="nearest")
    right.set_yticks(range(len(mean)), [f"stratum {t + 1}" for t in range(len(mean))])
    right.set_xlabel("channels, each beside those that the same stratum weighs most")
    figure.colorbar(shades, label="mean over images")
    _save(figure, path)
    return (
        "The channel weights sqrt(c) a_t of a batch: 1 (dotted) is a channel that counts as without the regularizer. "
        "Disjoint strata show as separate bright blocks, equal ones as equal rows."
    )


def neighbours_grid(
    dataset: Dataset, features: Mapping[str, Tensor], split: str, path: Path, images: int = 10, k: int = 5
) -> str:
    """Draw test images and the training images with the nearest features. Write `path` and return a caption."""
    test = dataset.tests[split]
    chosen = torch.linspace(0, len(test) - 1, min(images, len(test))).long()
    k = min(k, len(features["train"]))
    _, nearest = neighbours(features["train"], features[split][chosen], k, normalised=True)
    rows = {split.replace("_", " "): test.load(chosen)}
    for rank in range(k):
        rows[f"nearest {rank + 1}"] = dataset.train.load(nearest[:, rank])
    if not dataset.classified:
        _grid(rows, path)
        return f"Images of the test split {split} and their nearest training images."
    hits = dataset.train.labels[nearest] == test.labels[chosen][:, None]
    _grid(rows, path, marks={f"nearest {rank + 1}": hits[:, rank] for rank in range(k)})
    return f"Images of the test split {split} and their nearest training images; a green frame marks the same class."


def map_figure(dataset: Dataset, features: Tensor, split: str, path: Path, images: int = 2000) -> str:
    """Draw test images as points: two principal components of their unit features (N, c), coloured by class.

    Write `path` and return a caption.
    """
    labels = dataset.tests[split].labels.cpu()
    chosen = torch.linspace(0, len(labels) - 1, min(images, len(labels))).long()
    rows = F.normalize(features[chosen].double(), dim=1)
    rows = rows - rows.mean(0)
    left, scale, _ = torch.linalg.svd(rows, full_matrices=False)
    shown = (left * scale)[:, :2]
    shown = shown * shown.gather(0, shown.abs().argmax(0, keepdim=True)).sign()  # the sign is arbitrary: fix it
    share = scale.square() / scale.square().sum().clamp(min=1e-30)
    figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    classes = dataset.classes if dataset.classified else ()
    several = 0 < len(classes) <= 20
    if not classes:
        axes.scatter(shown[:, 0], shown[:, 1], s=7, alpha=0.7, lw=0)
    for k, name in enumerate(classes):
        of_class = shown[labels[chosen] == k]
        colour = matplotlib.colormaps["tab20"](k % 20)
        axes.scatter(
            of_class[:, 0], of_class[:, 1], s=7, color=colour, alpha=0.7, lw=0, label=plain(name) if several else None
        )
    axes.set(xlabel=f"first component, {100 * share[0]:.0f} %", ylabel=f"second, {100 * share[1]:.0f} %")
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    if several:
        axes.legend(frameon=False, fontsize=8, markerscale=2.5, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)
    return (
        f"Images of the test split {split} by the two principal components of their unit features and their share of "
        f"the variance{', coloured by class' if classes else ''}: two dimensions of many."
    )


@dataclass(frozen=True)
class Scene:
    """The data for pictures. A picture whose data is missing is not drawn."""

    dataset: Dataset
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 (N, c) features of the trained encoder by split, including `train`."""
    batch: Callable[[], Views] | None = None
    """Returns a batch of training views, on the device of the backbone."""
    backbone: Backbone | None = None
    strata: Callable[[Tensor], Tensor] | None = None
    """Maps normalised images to A(X), (N, S, c)."""
    overlays: Overlays | None = None
    """Maps of the encoders over test images."""

    @cached_property
    def views(self) -> Views | None:
        """The batch of training views, made once; None without `batch`."""
        return None if self.batch is None else self.batch()

    @cached_property
    @torch.no_grad()
    def weights(self) -> Tensor | None:
        """A(X), (N, S, c), of the images of the batch; None without `batch` or `strata`."""
        return None if self.strata is None or self.views is None else self.strata(self.views.images)

    @property
    def split(self) -> str:
        """The most informative test split."""
        tests = self.dataset.tests
        return "mixed_rand" if "mixed_rand" in tests else next(iter(tests))


def _views(scene: Scene, path: Path) -> str | None:
    data = scene.dataset
    return None if scene.views is None else views_grid(scene.views, data.mean, data.std, path)


def _negatives(scene: Scene, path: Path) -> str | None:
    views, data = scene.views, scene.dataset
    return None if views is None or views.negatives is None else negatives_grid(views, data.mean, data.std, path)


def _strata(scene: Scene, path: Path) -> str | None:
    views, weights, data = scene.views, scene.weights, scene.dataset
    if views is None or weights is None or scene.backbone is None:
        return None
    return strata_grid(scene.backbone, weights[:10], views.images[:10], data.mean, data.std, path)


def _weights(scene: Scene, path: Path) -> str | None:
    return None if scene.weights is None else weights_figure(scene.weights, path)


def _neighbours(scene: Scene, path: Path) -> str | None:
    features = scene.features
    return neighbours_grid(scene.dataset, features, scene.split, path) if "train" in features else None


def _map(scene: Scene, path: Path) -> str | None:
    features = scene.features.get(scene.split)
    if features is None or min(features.shape) < 2:  # two components need two images
        return None
    return map_figure(scene.dataset, features, scene.split, path)


def _attention(scene: Scene, path: Path) -> str | None:
    found = scene.overlays
    if found is None:
        return None
    rows = {
        f"{kind}, {encoder}": (found.images, maps) for kind, by in found.maps.items() for encoder, maps in by.items()
    }
    _save(grid({"image": found.images, **rows}, outlines=found.masks), path)
    return (
        "Where the last feature map is strong (Eigen-CAM, which knows no class) and what a linear probe takes for "
        "the class from (Grad-CAM). Each map is scaled by itself; the line is the outline of the object."
    )


PICTURES: dict[str, Callable[[Scene, Path], str | None]] = {
    "views.png": _views,
    "negatives.png": _negatives,
    "strata.png": _strata,
    "weights.png": _weights,
    "attention.png": _attention,
    "neighbours.png": _neighbours,
    "map.png": _map,
}
"""Functions by file name. Each draws the file and returns its caption; None if there is nothing to draw."""


def draw(scene: Scene, folder: Path) -> list[str]:
    """Draw all pictures and write `captions.json`. Return the files that could not be drawn, with the reasons."""
    folder.mkdir(exist_ok=True)
    captions, missing = {}, []
    for name, picture in PICTURES.items():
        try:
            caption = picture(scene, folder / name)
        except UserError:
            raise
        except Exception as error:
            (folder / name).unlink(missing_ok=True)
            missing.append(f"{name} ({reason(error)})")
            continue
        if caption is not None:
            captions[name] = caption
    if captions:
        atomic_write(folder / "captions.json", json.dumps(captions, indent=2), RunFolder(folder.parent).advice)
    return missing


def _save(figure: Figure, path: Path) -> None:
    with replacing(path, RunFolder(path.parents[1]).advice) as file:
        figure.savefig(file, format="png")


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return normalised float images (N, 3, H, W) as uint8."""
    scale = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    return ((images.float() * scale + shift) * 255).round().clamp(0, 255).byte()


def _grid(
    rows: Mapping[str, Tensor | tuple[Tensor, Tensor]], path: Path, marks: Mapping[str, Tensor] | None = None
) -> None:
    """Draw images (n, 3, H, W) by row, or pairs of images and maps (n, h, w), with frames as in `figures.grid`."""

    def drawn(images: Tensor) -> Any:
        return images.permute(0, 2, 3, 1).cpu().numpy()

    shown = {
        name: (drawn(row[0]), row[1].cpu().numpy()) if isinstance(row, tuple) else drawn(row)
        for name, row in rows.items()
    }
    _save(grid(shown, marks={name: chosen.cpu().numpy() for name, chosen in (marks or {}).items()}), path)
