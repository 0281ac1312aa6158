"""Shape or texture? Images whose shape is of one class and whose texture is of another.

Geirhos et al., ImageNet-trained CNNs are biased towards texture, ICLR 2019: of the decisions for either class, the
shape bias is the share that is for the shape. Hermann et al., The origins and prevalence of texture bias in
convolutional neural networks, NeurIPS 2020: what a representation holds of each is another question, which linear
probes inside the stimuli answer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from icl_msr.data.dataset import Dataset
from icl_msr.data.folders import FileSplit
from icl_msr.errors import UserError
from icl_msr.evaluation.features import extract
from icl_msr.evaluation.knn import PresetName
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.suite import Accuracy, Evaluation, Extractor, Fraction, Gap, Results, Row, both

CUES = ("shape", "texture")


class ShapeBias(TypedDict):
    """How one classifier decides where shape and texture disagree; shares in [0, 1], with 95 % intervals."""

    encoder: str
    classifier: str
    fitted_on: str
    classes: list[str]
    """Those that the classifier knows: what the data set covers of the stimuli."""
    n: int
    """Images whose shape and texture are both of such classes."""
    decided: int
    """Those of them that are taken for either."""
    shape_bias: float | None
    """Share of the decided ones that are taken for their shape; None where nothing is decided."""
    low: float | None
    high: float | None
    shape: float
    """Share of the n that are taken for their shape."""
    texture: float


class Decodability(TypedDict):
    """Accuracy of a linear probe that was fitted to other stimuli, for the shape or for the texture, in [0, 1]."""

    encoder: str
    cue: str
    """`shape` or `texture`."""
    classes: int
    n: int
    folds: int
    """No fold of the test has an instance (`cat7`) of the fitting set."""
    accuracy: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Stimuli:
    """Cue-conflict images: file, and class and instance of shape and texture; images without a conflict left out."""

    files: list[str]
    classes: list[str]
    labels: Mapping[str, Tensor]
    """(N,) int64 by cue."""
    instances: Mapping[str, list[str]]
    """`cat7` by cue."""
    without_conflict: int
    """Images left out, because shape and texture are of one class."""

    def __len__(self) -> int:
        return len(self.files)


def read_stimuli(folder: Path) -> Stimuli:
    """Geirhos's layout: `<shape class>/<shape><N>-<texture><M>.jpg`.

    Raises:
        UserError: there is no such folder, or an image in it is named otherwise.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; set evaluation.stimuli to the folder of cue-conflict images.")
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMG_EXTENSIONS)
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


class ShapeAndTexture:
    """Shape bias of classifiers fitted on a data set, and decodability of shape and texture inside the stimuli.

    Config keys: those of `suite.Evaluation`; `stimuli`, the folder (`read_stimuli`); `same`, the classes of the data
    set that a class of the stimuli stands for where they have another name; `folds` of the decodability, at most one
    for each instance of a class. Classifiers are fitted on the images of the covered classes alone, under the stimuli's
    names.
    """

    def __init__(
        self,
        *,
        knn: list[PresetName],
        linear: bool,
        learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)],
        probe_epochs: PositiveInt,
        probe_batch_size: PositiveInt,
        probe_held_out: Fraction,
        bootstrap: PositiveInt,
        untrained: bool,
        batch_size: PositiveInt,
        stimuli: str,
        same: dict[str, list[str]],
        folds: Annotated[int, Field(ge=2)],
    ) -> None:
        self.classifiers = Evaluation(
            knn=knn,
            linear=linear,
            learning_rates=learning_rates,
            probe_epochs=probe_epochs,
            probe_batch_size=probe_batch_size,
            probe_held_out=probe_held_out,
            bootstrap=bootstrap,
            untrained=untrained,
            batch_size=batch_size,
        )
        self.bootstrap, self.untrained, self.batch_size = bootstrap, untrained, batch_size
        self.stimuli = read_stimuli(Path(stimuli).expanduser())
        self.same, self.folds = same, folds
        unknown = sorted(same.keys() - set(self.stimuli.classes))
        if unknown:
            raise UserError(
                f"evaluation.same.{unknown[0]} is no class of the stimuli, which are {', '.join(self.stimuli.classes)}."
            )

    def names(self, dataset: Dataset) -> list[str]:
        """What will be measured: `classifier/fitted_on/split`.

        Raises:
            UserError: a class of `same` is not in the data set.
        """
        label = covered(self.stimuli.classes, dataset.classes, self.same)
        bias = self.classifiers.classifiers if self._conflicts(label)[0].numel() else []
        decoded = [f"linear/stimuli/{cue}" for cue in CUES]
        return [*(f"{classifier}/train/conflict_{cue}" for classifier in bias for cue in CUES), *decoded]

    def __call__(
        self,
        encoder: nn.Module,
        dataset: Dataset,
        *,
        device: torch.device | str,
        seed: int,
        untrained_encoder: nn.Module | None = None,
        extractor: Extractor = extract,
    ) -> Results:
        """See `suite.Evaluation`. Without two covered classes there is no shape bias, and decodability alone.

        Among the accuracies, the splits `conflict_shape` and `conflict_texture` are the shares that are taken for
        either, and `shape` and `texture`, fitted on `stimuli`, the decodability.
        """
        device = torch.device(device)
        results, bootstrap = Results(), Bootstrap(self.bootstrap, seed)
        shown = FileSplit(self.stimuli.files, self.stimuli.labels["shape"], dataset.image_size)
        label = covered(self.stimuli.classes, dataset.classes, self.same)
        for which, network in both(encoder, untrained_encoder if self.untrained else None).items():
            keys = {"mean": dataset.mean, "std": dataset.std, "device": device, "batch_size": self.batch_size}
            stimuli = extractor(network, shown, **keys, label=f"{which} features of stimuli").to(device)  # type: ignore[arg-type]
            if self._conflicts(label)[0].numel():
                train = extractor(network, dataset.train, **keys, label=f"{which} features of train").to(device)  # type: ignore[arg-type]
                self._bias(which, train, dataset.train.labels.to(device), stimuli, label, seed, bootstrap, results)
            for cue in CUES:
                self._decode(which, cue, stimuli, seed, bootstrap, results)
        return results

    def _conflicts(self, label: Mapping[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (n,) of the stimuli whose shape and texture are both covered, and the two as places among the
        covered classes.
        """
        classes = sorted(set(label.values()))
        shape, texture = (self._among(self.stimuli.labels[cue], classes) for cue in CUES)
        chosen = ((shape >= 0) & (texture >= 0)).nonzero()[:, 0]
        return chosen, shape[chosen], texture[chosen]

    def _bias(
        self,
        which: str,
        train: Tensor,
        labels: Tensor,
        stimuli: Tensor,
        label: Mapping[int, int],
        seed: int,
        bootstrap: Bootstrap,
        results: Results,
    ) -> None:
        """`label` is the stimuli's class of a class of the data set."""
        classes = sorted(set(label.values()))
        translate = labels.new_full((int(labels.max()) + 2,), -1)  # the last for -1, images without a label
        for of_data, of_stimuli in label.items():
            if of_data < len(translate) - 1:
                translate[of_data] = classes.index(of_stimuli)
        chosen, shape, texture = self._conflicts(label)
        queries = stimuli[chosen.to(stimuli.device)]
        scores, _ = self.classifiers.fit(train, translate[labels], queries, len(classes), seed)
        for classifier, values in scores.items():
            taken = values.argmax(1).cpu()
            for_shape, for_texture = taken == shape, taken == texture
            decided = for_shape | for_texture
            bias, low, high = bootstrap.mean(for_shape[decided]) if decided.any() else (None, None, None)
            row = Row(encoder=which, classifier=classifier, fitted_on="train")
            found = ShapeBias(
                **row,
                classes=[self.stimuli.classes[k] for k in classes],
                n=len(shape),
                decided=int(decided.sum()),
                shape_bias=bias,
                low=low,
                high=high,
                shape=for_shape.float().mean().item(),
                texture=for_texture.float().mean().item(),
            )
            results.shape.append(found)
            for cue, hits in zip(CUES, (for_shape, for_texture), strict=True):
                results.accuracies.append(_accuracy(row, f"conflict_{cue}", hits, bootstrap))
            points, least, most = (100 * v for v in bootstrap.difference(for_shape, for_texture, paired=True))
            gap = "conflict_shape - conflict_texture"
            results.gaps.append(Gap(**row, gap=gap, points=points, low=least, high=most))

    @staticmethod
    def _among(labels: Tensor, classes: Sequence[int]) -> Tensor:
        """Places of labels (N,) in `classes`, -1 where they are not."""
        places = torch.full_like(labels, -1)
        for place, k in enumerate(classes):
            places[labels == k] = place
        return places

    def _decode(self, which: str, cue: str, stimuli: Tensor, seed: int, bootstrap: Bootstrap, results: Results) -> None:
        labels, classes = self.stimuli.labels[cue], len(self.stimuli.classes)
        fold, folds = folds_by_instance(self.stimuli.instances[cue], labels, self.folds)
        hits = torch.zeros(len(labels), dtype=torch.bool)
        for k in range(folds):
            rest, held = (part.to(stimuli.device) for part in (fold != k, fold == k))
            probe = self.classifiers.fit_probe(stimuli[rest], labels.to(stimuli.device)[rest], classes, seed=seed)
            hits[fold == k] = probe(stimuli[held]).argmax(1).cpu() == labels[fold == k]
        right = _accuracy(Row(encoder=which, classifier="linear", fitted_on="stimuli"), cue, hits, bootstrap)
        results.accuracies.append(right)
        kinds = len(set(labels.tolist()))
        found = Decodability(
            encoder=which,
            cue=cue,
            classes=kinds,
            n=len(labels),
            folds=folds,
            accuracy=right["top1"],
            low=right["low"],
            high=right["high"],
            chance=1 / kinds,
        )
        results.decodability.append(found)


def _accuracy(row: Row, split: str, hits: Tensor, bootstrap: Bootstrap) -> Accuracy:
    top1, low, high = bootstrap.mean(hits)
    return Accuracy(**row, split=split, top1=top1, low=low, high=high, n=len(hits), top5=None)


def covered(stimuli: Sequence[str], classes: Sequence[str], same: Mapping[str, Sequence[str]]) -> dict[int, int]:
    """Number of a class of the data set to that of the stimuli's class which it belongs to.

    Raises:
        UserError: `same` names a class that the data set has not.
    """
    label: dict[int, int] = {}
    for k, name in enumerate(stimuli):
        for other in same.get(name, [name] if name in classes else []):
            if other not in classes:
                raise UserError(
                    f"evaluation.same.{name} names {other}, which is no class of the data set "
                    f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})."
                )
            label[classes.index(other)] = k
    return label


def folds_by_instance(instances: Sequence[str], labels: Tensor, folds: int) -> tuple[Tensor, int]:
    """The fold of each image (N,), all images of an instance in one and the instances of every class shared out, and
    how many folds there are: `folds`, or fewer where a class has fewer instances.
    """
    by_class: dict[int, list[str]] = {}
    for name, k in sorted(set(zip(instances, labels.tolist(), strict=True))):
        by_class.setdefault(k, []).append(name)
    folds = max(2, min(folds, *map(len, by_class.values()))) if len(by_class) > 1 else 2
    place = {name: i % folds for names in by_class.values() for i, name in enumerate(names)}
    return torch.tensor([place[name] for name in instances]), folds
