"""Shape bias and decodability on cue-conflict images, whose shape and texture belong to different classes.

Geirhos et al., ImageNet-trained CNNs are biased towards texture, ICLR 2019: the shape bias is the share of decisions
for the shape among all decisions for the shape or the texture. Hermann et al., The origins and prevalence of texture
bias in convolutional neural networks, NeurIPS 2020: linear probes, fitted to the stimuli, measure how much of shape and
of texture a representation holds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.records import ACCURACY, GAP, TRAINED, Chart, Classifier, Layout, Measurement
from icl_msr.core.storage import expanded
from icl_msr.data.dataset import Dataset, Split
from icl_msr.data.files import FileSplit
from icl_msr.data.listing import Listing
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.sixteen import SIXTEEN, sixteen
from icl_msr.evaluation.suite import Evaluation, Fit, Results, Task, accuracy, gap
from icl_msr.models.foreign import with_classifier

CUES = ("shape", "texture")
HEAD = Classifier(family="head")


SHAPE = Layout(
    kind="shape",
    title="Shape bias on cue-conflict images, %",
    rows=("classifier", "encoder"),
    labels={"shape_bias": "shape bias", "shape": "taken for shape", "texture": "taken for texture"},
    details={"shape_bias": "of the decided images"},
    count="images",
    chart=Chart(axis="metric", series=("classifier", "encoder"), where={"unit": "fraction"}),
)
"""Decisions of a classifier on `n` images whose shape and texture are both among its `classes`. `decided` of them are
taken for their shape or their texture. `shape_bias` is the share of these that are taken for their shape."""
DECODABILITY = Layout(
    kind="decodability",
    title="Accuracy of probes on the stimuli, %",
    rows=("cue", "encoder"),
    about="Linear probes for shape and texture. No probe is tested on an instance that it was fitted to.",
    count="n",
)


@dataclass(frozen=True)
class Stimuli:
    """Cue-conflict images: files, with class and instance of shape and texture."""

    files: list[str]
    classes: list[str]
    labels: Mapping[str, Tensor]
    """(N,) int64 by cue."""
    instances: Mapping[str, list[str]]
    """Instances such as `cat7`, by cue."""
    without_conflict: int
    """Number of images that are left out, because shape and texture belong to one class."""

    def __len__(self) -> int:
        return len(self.files)


def read_stimuli(folder: Path) -> Stimuli:
    """Read a folder in the layout of Geirhos et al.: `<shape class>/<shape><N>-<texture><M>.jpg`.

    Raises:
        UserError: there is no such folder, it has no cue-conflict images, or an image is named differently.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set evaluation.stimuli to the folder of cue-conflict images.")
    listing = Listing(folder, follow_links=True)
    files = [Path(file) for shape in listing.folders(folder) for file in listing.here(shape)]
    found, without = [], 0
    for path in files:
        parts = re.fullmatch(r"([^\d-]+)(\d+)-([^\d-]+)(\d+)", path.stem)
        if not parts or parts[1] != path.parent.name:
            raise UserError(
                f"{path} is not named as a cue-conflict image, <shape class>/<shape class>N-<texture class>M"
                f"{path.suffix}; rename or remove it."
            )
        if parts[1] == parts[3]:
            without += 1
        else:
            found.append((str(path), parts[1], parts[3], f"{parts[1]}{parts[2]}", f"{parts[3]}{parts[4]}"))
    if not found:
        raise UserError(
            f"{folder} has no cue-conflict images, {folder.name}/<shape>/<shape>N-<texture>M.jpg; add some."
        )
    names, shapes, textures, shape_instances, texture_instances = (list(column) for column in zip(*found, strict=True))
    classes = sorted({*shapes, *textures})
    labels = {
        cue: torch.tensor([classes.index(k) for k in column])
        for cue, column in zip(CUES, (shapes, textures), strict=True)
    }
    return Stimuli(names, classes, labels, {"shape": shape_instances, "texture": texture_instances}, without)


@dataclass(kw_only=True)
class ShapeAndTexture(Evaluation):
    """Shape bias of classifiers fitted on a data set, and decodability of shape and texture from the stimuli.

    Config keys: those of `suite.Evaluation`. `stimuli` is the folder (`read_stimuli`). `same` maps a class of the
    stimuli to classes of the data set, if their names differ. `head` asks for the decisions of the ImageNet classifier
    that an encoder of timm or torchvision came with, beside those of the fitted classifiers (`sixteen`). `folds` is the
    number of folds for decodability, at most one for each instance of a class. Classifiers are fitted only on images of
    the covered classes, under the names of the stimuli.

    In the accuracies, the splits `conflict_shape` and `conflict_texture` are the shares that are taken for the shape
    and for the texture. The splits `shape` and `texture`, fitted on `stimuli`, are the decodability. If fewer than two
    classes are covered, only the decodability is measured.
    """

    stimuli: str
    same: dict[str, list[str]]
    head: bool
    folds: Annotated[int, Field(ge=2)]
    shown: Stimuli = field(init=False)

    def __post_init__(self) -> None:
        self.shown = read_stimuli(expanded(self.stimuli))
        unknown = sorted(self.same.keys() - set(self.shown.classes))
        if unknown:
            raise UserError(
                f"evaluation.same.{unknown[0]} is not a class of the stimuli ({', '.join(self.shown.classes)})."
            )

    @override
    def names(self, dataset: Dataset) -> list[str]:
        label = covered(self.shown.classes, dataset.classes, self.same)
        bias = [f"{classifier}/train" for classifier in self.classifiers if self._conflicts(label)[0].numel()]
        if bias:
            require_labels(dataset)
        bias += [f"{HEAD}/own"] if self.head else []
        decoded = [f"{self.linear_classifier}/stimuli/{cue}" for cue in CUES]
        return [*(f"{classifier}/conflict_{cue}" for classifier in bias for cue in CUES), *decoded]

    @override
    def require(self, encoder: nn.Module) -> None:
        if not self.head:
            return
        if not self._conflicts(self._of_sixteen())[0].numel():
            raise UserError(
                f"evaluation.head=true decides among {', '.join(SIXTEEN)}, and no image of {self.stimuli} has shape "
                "and texture among them; leave it out."
            )
        with_classifier(encoder)

    @override
    def measure(self, task: Task, results: Results) -> None:
        dataset = task.dataset
        label = covered(self.shown.classes, dataset.classes, self.same)
        images = FileSplit(self.shown.files, self.shown.labels["shape"], dataset.image_size)
        stimuli = task.features(images, "stimuli")
        if self._conflicts(label)[0].numel():
            self._bias(task, task.features(dataset.train, "train"), stimuli, label, results)
        if self.head and task.encoder == TRAINED:  # an untrained copy has none
            self._head(replace(task, network=with_classifier(task.network)), images, results)
        for cue in CUES:
            self._decode(task, cue, stimuli, results)

    def _conflicts(self, label: Mapping[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions (n,) of stimuli with both classes covered, and their shape and texture (n,).

        Shape and texture are places among the covered classes.
        """
        classes = sorted(set(label.values()))
        shape, texture = (self._among(self.shown.labels[cue], classes) for cue in CUES)
        chosen = ((shape >= 0) & (texture >= 0)).nonzero()[:, 0]
        return chosen, shape[chosen], texture[chosen]

    def _bias(self, task: Task, train: Tensor, stimuli: Tensor, label: Mapping[int, int], results: Results) -> None:
        """Record the decisions of fitted classifiers. `label` maps classes of the data set to those of the stimuli."""
        labels = task.dataset.train.labels.to(task.device)
        classes = sorted(set(label.values()))
        translate = labels.new_full((int(labels.max()) + 2,), -1)  # the last place is for -1, images without a label
        for of_data, of_stimuli in label.items():
            if of_data < len(translate) - 1:
                translate[of_data] = classes.index(of_stimuli)
        chosen, shape, texture = self._conflicts(label)
        queries = stimuli[chosen.to(stimuli.device)]
        scores, _ = self.fit(train, translate[labels], queries, len(classes), task.seed)
        names = [self.shown.classes[k] for k in classes]
        for classifier, values in scores.items():
            taken = values.argmax(1).cpu()
            _record(task, Fit(task.encoder, classifier, "train"), names, taken, shape, texture, results)

    def _of_sixteen(self) -> dict[int, int]:
        """Return the class of the stimuli, by number, for each of the 16 classes with the same name."""
        return covered(self.shown.classes, list(SIXTEEN), {})

    def _head(self, task: Task, images: Split, results: Results) -> None:
        """Record the decisions of the encoder's own classifier; `task.network` includes it."""
        label, names = self._of_sixteen(), list(SIXTEEN)
        chosen, *cues = self._conflicts(label)
        places = torch.tensor([names.index(self.shown.classes[k]) for k in sorted(label.values())])
        taken = sixteen(task.features(images, "stimuli, with its classifier").cpu()).argmax(1)[chosen]
        shape, texture = (places[cue] for cue in cues)
        _record(task, Fit(task.encoder, HEAD, "own"), names, taken, shape, texture, results)

    @staticmethod
    def _among(labels: Tensor, classes: Sequence[int]) -> Tensor:
        """Return the places of labels (N,) in `classes`; -1 for labels that are not in it."""
        places = torch.full_like(labels, -1)
        for place, k in enumerate(classes):
            places[labels == k] = place
        return places

    def _decode(self, task: Task, cue: str, stimuli: Tensor, results: Results) -> None:
        labels, classes = self.shown.labels[cue], len(self.shown.classes)
        fold, folds = folds_by_instance(self.shown.instances[cue], labels, self.folds)
        hits = torch.zeros(len(labels), dtype=torch.bool)
        for k in range(folds):
            rest, held = (part.to(task.device) for part in (fold != k, fold == k))
            probe = self.fit_probe(stimuli[rest], labels.to(task.device)[rest], classes, task.seed)
            hits[fold == k] = probe(stimuli[held]).argmax(1).cpu() == labels[fold == k]
        interval, kinds = task.bootstrap.mean(hits), len(set(labels.tolist()))
        fit = Fit(task.encoder, self.linear_classifier, "stimuli")
        results.records.add(ACCURACY, accuracy(fit, cue, interval, len(labels)))
        record = partial(Measurement, kind=DECODABILITY.kind, encoder=task.encoder, n=len(labels), factors={"cue": cue})
        results.records.add(
            DECODABILITY,
            record(**interval._asdict()),
            record(metric="chance", value=1 / kinds),
            record(metric="classes", value=kinds, unit="count"),
            record(metric="folds", value=folds, unit="count"),
        )


def _record(
    task: Task, fit: Fit, classes: list[str], taken: Tensor, shape: Tensor, texture: Tensor, results: Results
) -> None:
    """Record the decisions of one classifier on n images.

    The decisions `taken`, and `shape` and `texture`, are places (n,) in `classes`.
    """
    bootstrap, hits = task.bootstrap, {"shape": taken == shape, "texture": taken == texture}
    decided = hits["shape"] | hits["texture"]
    bias: Mapping[str, Any] = {"value": None}
    if decided.any():
        bias = bootstrap.mean(hits["shape"][decided])._asdict()
    record = partial(Measurement, kind=SHAPE.kind, n=len(shape), **fit._asdict())
    results.records.add(
        SHAPE,
        record(metric="classes", value=len(classes), unit="count", note=", ".join(classes)),
        record(metric="decided", value=int(decided.sum()), unit="count"),
        record(metric="shape_bias", **bias),
        *(record(metric=cue, value=hits[cue].float().mean().item()) for cue in CUES),
    )
    for cue in CUES:
        results.records.add(
            ACCURACY, accuracy(fit, f"conflict_{cue}", bootstrap.mean(hits[cue]), len(shape), good=False)
        )
    apart = bootstrap.difference(hits["shape"], hits["texture"], paired=True)
    results.records.add(GAP, gap(fit, "conflict_shape", "conflict_texture", apart))


def covered(stimuli: Sequence[str], classes: Sequence[str], same: Mapping[str, Sequence[str]]) -> dict[int, int]:
    """Return the class of the stimuli, by number, that each covered class of the data set belongs to.

    Raises:
        UserError: `same` names a class that the data set does not have.
    """
    label: dict[int, int] = {}
    for k, name in enumerate(stimuli):
        for other in same.get(name, [name] if name in classes else []):
            if other not in classes:
                raise UserError(
                    f"evaluation.same.{name} names {other}, which is not a class of the data set "
                    f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})."
                )
            label[classes.index(other)] = k
    return label


def folds_by_instance(instances: Sequence[str], labels: Tensor, folds: int) -> tuple[Tensor, int]:
    """Return the fold of each image (N,), and the number of folds: `folds`, or fewer if a class has fewer instances.

    All images of an instance are in one fold, and the instances of every class are spread over the folds.
    """
    by_class: dict[int, list[str]] = {}
    for name, k in sorted(set(zip(instances, labels.tolist(), strict=True))):
        by_class.setdefault(k, []).append(name)
    folds = max(2, min(folds, *map(len, by_class.values()))) if len(by_class) > 1 else 2
    place = {name: i % folds for names in by_class.values() for i, name in enumerate(names)}
    return torch.tensor([place[name] for name in instances]), folds
