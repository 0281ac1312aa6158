"""Where features look: class activation maps, their share on the object, and the pointing game.

Eigen-CAM (Muhammad and Yeasin, IJCNN 2020) projects the last feature map on its first principal direction, and knows no
class. Grad-CAM (Selvaraju et al., ICCV 2017) weighs the channels by the gradient of a class score, here that of a
linear probe. Where features are the mean of the last map, this gradient is the same at every place, and Grad-CAM is the
class activation map of Zhou et al. (CVPR 2016). The pointing game (Zhang et al., ECCV 2016) asks whether the largest
value lies on the object. Both measures are also taken on the object of another image, as in `strata_maps`: a map that
does not see the object, but is stronger in the middle, would be as good there.

N images, c channels; a map is (h, w).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.figures import Overlays
from icl_msr.core.records import Chart, Layout, Measurement
from icl_msr.data.dataset import Dataset, normalise
from icl_msr.evaluation.linear import LinearProbe
from icl_msr.evaluation.strata_maps import masks_of, on_object, split_with_masks
from icl_msr.evaluation.suite import Evaluation, Fit, Results, Task, keep_predictions, named_split, record_accuracy
from icl_msr.models.backbones import Backbone, evaluating

EIGEN, GRAD = "Eigen-CAM", "Grad-CAM"

ATTENTION = Layout(
    kind="attention",
    title="Where the features look, %",
    rows=("map", "split", "encoder"),
    labels={"split": "images of", "share": "on the object", "share_elsewhere": "if it did not see it"}
    | {"pointing": "pointing game", "pointing_elsewhere": "if it did not see it"},
    details={"share": "share of the map", "pointing": "its maximum is on the object"},
    about="Maps that are zero everywhere are left out.",
    count="images",
    chart=Chart(
        axis="map",
        series=("encoder",),
        where={"metric": "share"},
        note="Share of the map on the object. Bars are 95 % intervals over images.",
    ),
)


class Seen(NamedTuple):
    """Measures of the maps of N images, each (N,): on the object, and at the place of another image's object."""

    share: Tensor
    share_elsewhere: Tensor
    pointing: Tensor
    pointing_elsewhere: Tensor


@dataclass(kw_only=True)
class Attention(Evaluation):
    """Class activation maps of the encoder, compared with the masks or boxes of the objects.

    Config keys: those of `suite.Evaluation`. `split` names a test split with masks; null is the first. `images` is the
    largest number of images, spread evenly over the split. `pictured` is the number of images in the picture of
    overlays, which are the same for every encoder. Grad-CAM needs classes, `linear`, and an encoder whose features are
    the mean of its last map, such as a ResNet. Without them there is Eigen-CAM alone.
    """

    split: str | None
    images: PositiveInt
    pictured: PositiveInt

    @override
    def names(self, dataset: Dataset) -> list[str]:
        return [f"attention/{metric}/{self._split(dataset)}/{EIGEN}" for metric in Seen._fields]

    def _split(self, dataset: Dataset) -> str:
        """Return the name of the test split.

        Raises:
            UserError: it has no masks.
        """
        first = split_with_masks(dataset)
        if first is None:
            raise UserError(
                f"{dataset.name} does not say where the objects are; set dataset.masks or dataset.boxes, or choose "
                "another data set, such as dataset=confounded."
            )
        name = named_split(dataset, self.split or first)
        if masks_of(dataset.tests[name], torch.arange(1)) is None:
            raise UserError(f"{name} has no masks of its objects; set evaluation.split={first}.")
        return name

    @override
    def require(self, encoder: nn.Module) -> None:
        if not isinstance(encoder, Backbone):
            raise UserError("evaluation=attention needs an encoder with feature maps; choose another backbone.")

    @override
    def measure(self, task: Task, results: Results) -> None:
        name = self._split(task.dataset)
        split = task.dataset.tests[name]
        index = torch.linspace(0, len(split) - 1, min(self.images, len(split))).round().long()
        probe = self._probe(task, name, results) if task.dataset.classified and self.linear else None
        maps, masks = self._maps(task, name, index, probe)
        there = masks.flatten(1).any(1)
        for kind, found in maps.items():
            seen = look(found[there], masks[there])
            record = partial(Measurement, kind=ATTENTION.kind, encoder=task.encoder, split=name, factors={"map": kind})
            for metric, values in seen._asdict().items():
                known = values[values.isfinite()]
                interval: dict[str, Any] = task.bootstrap.mean(known)._asdict() if len(known) else {"value": None}
                results.records.add(ATTENTION, record(metric=metric, n=len(known), **interval))
        chosen = there.nonzero()[:, 0]
        chosen = chosen[torch.linspace(0, len(chosen) - 1, min(self.pictured, len(chosen))).round().long()]
        self._picture(
            task, split.load(index[chosen]), masks[chosen], {k: found[chosen] for k, found in maps.items()}, results
        )

    def _probe(self, task: Task, split: str, results: Results) -> LinearProbe:
        """Return a linear probe fitted on the training images, after recording its accuracy."""
        dataset = task.dataset
        train, test = task.features(dataset.train, "train"), task.features(dataset.tests[split], split)
        labelled = dataset.train.labels >= 0
        labels = dataset.train.labels[labelled].to(task.device)
        probe = self.fit_probe(train[labelled.to(task.device)], labels, len(dataset.classes), task.seed)
        fit, scores = Fit(task.encoder, self.linear_classifier, "train"), probe(test).cpu()
        known = dataset.tests[split].labels.cpu()
        keep_predictions(fit, split, scores.argmax(1), known, results)
        record_accuracy(task, fit, split, scores, known, results)
        return probe

    @torch.no_grad()
    def _maps(
        self, task: Task, name: str, index: Tensor, probe: LinearProbe | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the maps (N, h, w) by their kind and the masks bool (N, S, S) of the images at `index`, on the CPU."""
        dataset, backbone = task.dataset, task.network.to(task.device)
        assert isinstance(backbone, Backbone)
        split = dataset.tests[name]
        maps: dict[str, list[Tensor]] = {}
        masks: list[Tensor] = []
        with evaluating(backbone):
            for chosen in torch.split(index, task.batch_size):
                images = normalise(split.load(chosen).to(task.device), dataset.mean, dataset.std)
                last = backbone.maps(images).float()
                maps.setdefault(EIGEN, []).append(eigen_cam(last).cpu())
                if probe is not None and not masks:
                    probe = probe if pools_by_mean(last, backbone(images)) else None
                if probe is not None:
                    labels = split.labels[chosen.to(split.labels.device)].to(task.device)
                    slopes = (probe.weight[:-1] / probe.scale[:, None]).T[labels]  # of the score, by each feature
                    maps.setdefault(GRAD, []).append(grad_cam(last, slopes).cpu())
                of_chosen = masks_of(split, chosen)
                assert of_chosen is not None
                masks.append(of_chosen.cpu())
        return {kind: torch.cat(found) for kind, found in maps.items()}, torch.cat(masks)

    def _picture(self, task: Task, images: Tensor, masks: Tensor, maps: dict[str, Tensor], results: Results) -> None:
        """Add the maps (n, h, w) of some images (n, 3, S, S), each scaled by its maximum, to the results."""
        scaled = {kind: found / found.amax((1, 2), keepdim=True).clamp(min=1e-12) for kind, found in maps.items()}
        known = results.overlays or Overlays(images.permute(0, 2, 3, 1).cpu().numpy(), masks.numpy(), {})
        merged = {k: {**known.maps.get(k, {}), task.encoder: found.half().numpy()} for k, found in scaled.items()}
        results.overlays = replace(known, maps={**known.maps, **merged})


def eigen_cam(maps: Tensor) -> Tensor:
    """Return Eigen-CAM (N, h, w) of maps (N, c, h, w): the projection on the first right singular vector of (hw, c).

    The sign, which a singular vector does not have, is that of the larger sum. Negative values become zero.
    """
    places = maps.flatten(2).mT  # (N, hw, c)
    # The products of places need no decomposition over the channels, which may be thousands.
    values, vectors = torch.linalg.eigh((places @ places.mT).double())
    cam: Tensor = (vectors[:, :, -1] * values[:, -1:].clamp(min=0).sqrt()).to(maps)
    cam = cam * cam.sum(1, keepdim=True).sign()
    return cam.clamp(min=0).view(-1, *maps.shape[2:])


def grad_cam(maps: Tensor, slopes: Tensor) -> Tensor:
    """Return Grad-CAM (N, h, w) of maps (N, c, h, w), whose mean over places is the features.

    `slopes` (N, c) is the gradient of a score by the features. Negative values become zero. The gradient at a place is
    `slopes / (h w)`; this factor is left out.
    """
    return torch.einsum("nc,nchw->nhw", slopes, maps).clamp(min=0)


def pools_by_mean(maps: Tensor, features: Tensor) -> bool:
    """Return whether features (N, c) are the mean of maps (N, c, h, w) over places."""
    return torch.allclose(maps.mean((2, 3)), features.float(), rtol=1e-3, atol=1e-4)


def look(maps: Tensor, masks: Tensor) -> Seen:
    """Compare maps (N, h, w) with masks bool (N, S, S), each with an object. A map that is zero gives NaN.

    The measures elsewhere are those on the next image's object, corrected by the difference of the two objects' areas.
    """
    area = masks.float().mean((1, 2))
    correction = area - area.roll(-1)

    def pointing(masks: Tensor) -> Tensor:
        """Whether the middle of the cell with the largest value is true."""
        height, width = maps.shape[1:]
        best = maps.flatten(1).argmax(1)
        row = (2 * (best // width) + 1) * masks.shape[1] // (2 * height)
        column = (2 * (best % width) + 1) * masks.shape[2] // (2 * width)
        hit = masks[torch.arange(len(masks)), row, column].float()
        return hit.where(maps.flatten(1).amax(1) > 0, torch.nan)

    def share(masks: Tensor) -> Tensor:
        return on_object(maps[:, None], masks)[:, 0]

    others = masks.roll(-1, 0)
    return Seen(share(masks), share(others) + correction, pointing(masks), pointing(others) + correction)
