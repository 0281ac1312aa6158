"""The share of each stratum's activation that lies on the object.

A flat map that does not see the object has a share equal to the object's area. Real maps are not flat: with padded
convolutions they are fainter towards the edges, where objects are rare. So the share at the object's place is also
measured on another image. The difference is due to the object.

N images, S strata, c channels. A map is the last feature map, h x w, with its channels weighted by a_t.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icl_msr.core.records import Chart, Layout, Measurement, Records
from icl_msr.data.dataset import ArraySplit, Dataset, Split, normalise
from icl_msr.data.files import FileSplit
from icl_msr.data.sources import fit
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.models.backbones import Backbone, evaluating

ALL = "all channels"
"""Name of the map that weights all channels equally."""


STRATA = Layout(
    kind="strata",
    title="Where the strata look",
    rows=("stratum",),
    labels={"stratum": "map of", "share": "on the object, %", "by_place": "if it did not see it, %"}
    | {"excess": "because of the object, points"},
    chart=Chart(
        axis="stratum",
        series=("encoder",),
        where={"metric": "excess"},
        note="Bars are 95 % intervals over images. On the dashed line a map does not see the object.",
    ),
)
"""The `share` of each stratum's map on the object; the share of a map that does not see the object (`by_place`: the
object's area, corrected for its place); and the `excess` of the first over the second."""
AREA, APART = "strata_area", "strata_apart"
"""Two kinds of records: the mean part of an image that the object covers, and the difference in points of the two
strata that differ most, which are chosen on half of the images and measured on the other half."""


class Found(NamedTuple):
    """Shares of the maps of N images.

    `shares` (N, 1 + S) are on the object, for all channels and for each stratum; NaN if a map is zero. `place`
    (N, 1 + S) is the share at the place of another image's object minus that object's area. `area` (N,) is the
    object's share of the image.
    """

    shares: Tensor
    place: Tensor
    area: Tensor


def weighted_maps(maps: Tensor, strata: Tensor) -> Tensor:
    """Return maps (N, S, h, w): the positive part of `maps` (N, c, h, w), weighted by `strata` (N, S, c).

    Narrower strata are shared by several encoders, whose maps are concatenated along the channels.
    """
    strata = strata.repeat(1, 1, maps.shape[1] // strata.shape[2])
    return torch.einsum("nsc,nchw->nshw", strata, maps.clamp(min=0))


def on_object(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of non-negative maps (N, S, h, w) on the object: (N, S) in [0, 1], NaN if a map is zero.

    `masks` (N, H, W) are true on the object. Each cell of a map is weighted by the exact part of its area that the
    object covers, as if the map were enlarged to the image without smoothing.
    """
    rows, columns = (_cells(fine, coarse) for fine, coarse in zip(masks.shape[1:], maps.shape[2:], strict=True))
    covered = rows.to(maps) @ masks.to(maps) @ columns.to(maps).T  # (N, h, w)
    return (maps * covered[:, None]).sum((2, 3)) / maps.sum((2, 3))


def _cells(fine: int, coarse: int) -> Tensor:
    """Return the part of each of `coarse` cells that lies in each of `fine` pixels on the same line: (coarse, fine)."""
    cell, pixel = (torch.arange(n + 1, dtype=torch.float64) / n for n in (coarse, fine))
    ends = torch.minimum(cell[1:, None], pixel[None, 1:])
    starts = torch.maximum(cell[:-1, None], pixel[None, :-1])
    return (ends - starts).clamp(min=0) * coarse


def masks_of(split: Split, index: Tensor) -> Tensor | None:
    """Return masks bool (n, S, S) of the images at `index`, as `split.load` returns them; None if not known."""
    if isinstance(split, ArraySplit):
        return None if split.masks is None else split.masks[index]
    if isinstance(split, FileSplit) and split.region == "full" and split.located:
        masks = (split.mask(i, split.image(i)) for i in index.tolist())
        return torch.stack([fit(mask[None].byte(), split.image_size, nearest=True)[0].bool() for mask in masks])
    return None


def split_with_masks(dataset: Dataset) -> str | None:
    """Return the first test split with masks of its objects, or None."""
    return next((name for name, split in dataset.tests.items() if masks_of(split, torch.arange(1)) is not None), None)


@torch.no_grad()
def measure(
    backbone: Backbone,
    strata: Callable[[Tensor], Tensor],
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    images: int,
    batch_size: int,
) -> Found:
    """Measure the maps on up to `images` images of a split with masks, spread evenly, without images of empty masks.

    `strata` maps normalised images to A(X). The backbone runs in evaluation mode and is otherwise not changed.
    """
    found = []
    index = torch.linspace(0, len(split) - 1, min(images, len(split))).round().long()
    with evaluating(backbone):
        for chosen in torch.tensor_split(index, -(-len(index) // batch_size)):
            masks = masks_of(split, chosen)
            assert masks is not None
            masks = masks.to(device)
            shown = normalise(split.load(chosen).to(device), mean, std)
            maps = backbone.maps(shown).float()
            weighted = weighted_maps(maps, strata(shown).float())
            weighted = torch.cat([maps.clamp(min=0).sum(1, keepdim=True), weighted], dim=1)
            area = masks.float().mean((1, 2))
            place = on_object(weighted, masks.roll(1, 0)) - area.roll(1)[:, None]
            columns = (on_object(weighted, masks), place, area)
            found.append([column[area > 0].cpu() for column in columns])
    return Found(*(torch.cat(column) for column in zip(*found, strict=True)))


def look_at_strata(
    backbone: Backbone,
    strata: Callable[[Tensor], Tensor],
    dataset: Dataset,
    *,
    device: torch.device | str,
    batch_size: int,
    bootstrap: Bootstrap,
    images: int = 1000,
) -> Records:
    """Measure the strata on the first test split with masks; return no records if there is none."""
    split = split_with_masks(dataset)
    if split is None:
        return Records()
    known: Any = {"mean": dataset.mean, "std": dataset.std, "device": device, "images": images}
    found = measure(backbone, strata, dataset.tests[split], batch_size=batch_size, **known)
    return strata_records(found, split, bootstrap)


def strata_records(found: Found, split: str, bootstrap: Bootstrap) -> Records:
    """Return means over images, and whether the strata differ. A stratum whose map is always zero is left out."""
    records, n, area = Records(), len(found.area), float(found.area.mean())
    about = (
        "Each stratum's map (the last feature map, weighted by its a_t): the share on the object, over "
        f"{n:,} images of {split}, with 95 % intervals. The object covers {100 * area:.1f} % of an image, which is "
        "the share of a flat map. Real maps are fainter or brighter towards the edges, so this is corrected by the "
        "share of the same map at the place of another image's object."
    )
    names = {str(t): f"stratum {t}" for t in range(1, found.shares.shape[1])}
    layout = replace(STRATA, about=about, labels={**STRATA.labels, **names})
    records.measurements.append(Measurement(kind=AREA, metric="area", value=area, split=split, n=n))
    for column, stratum in enumerate([ALL, *range(1, found.shares.shape[1])]):
        share = found.shares[:, column]
        excess = share - found.area - found.place[:, column]
        alive = excess.isfinite()
        if alive.any():
            value, above = bootstrap.mean(share[alive]), bootstrap.mean(excess[alive])
            points = {key: 100 * part for key, part in above._asdict().items()}
            record = partial(Measurement, kind=STRATA.kind, split=split, n=n, factors={"stratum": stratum})
            records.add(
                layout,
                record(metric="share", **value._asdict()),
                record(metric="by_place", value=value.value - above.value),
                record(metric="excess", unit="points", **points),
            )
    records.measurements += _difference(found.shares[:, 1:], split, bootstrap)
    return records


def _difference(shares: Tensor, split: str, bootstrap: Bootstrap) -> list[Measurement]:
    """Return the largest difference of two strata.

    The two are chosen and measured on different images: the largest of many differences is above zero by chance.
    """
    shares = shares[shares.isfinite().all(1)]
    if shares.shape[1] < 2 or len(shares) < 2:
        return []
    chosen_by, measured_on = shares[::2].mean(0), shares[1::2]
    more, less = int(chosen_by.argmax()), int(chosen_by.argmin())
    interval = bootstrap.mean(measured_on[:, more] - measured_on[:, less])
    points = {key: 100 * part for key, part in interval._asdict().items()}
    record = partial(Measurement, kind=APART, split=split, n=len(measured_on))
    which = [record(metric=name, value=t + 1, unit="count") for name, t in (("more", more), ("less", less))]
    return [record(metric="difference", unit="points", **points), *which]
