"""Accuracy on the worst group: images of one class that share another attribute, such as the background.

Sagawa et al., Distributionally robust neural networks for group shifts, ICLR 2020: the accuracy on the worst group, and
the mean over groups weighted by their shares of the training images. Kirichenko et al., Last layer re-training is
sufficient for robustness to spurious correlations, ICLR 2023 (deep feature reweighting): a probe that is fitted on as
many images of each group shows whether the features hold the class without the attribute. They average the weights of
probes fitted on several such subsets; we average the scores, which is the same for a linear probe.

n images, K classes, G groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.randomness import permutation
from icl_msr.core.records import Chart, Classifier, Layout, Measurement
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.labels import require_labels, some_of_each
from icl_msr.evaluation.suite import (
    Evaluation,
    Fit,
    Results,
    Task,
    keep_predictions,
    named_split,
    record_accuracy,
)

BALANCED = "balanced groups"
"""The name of the fitting set with as many images of each group."""
_SUBSET = -100
"""The `epoch` of the hash that draws the first subset; training epochs count from 0."""
METRICS = ("worst", "average", "weighted")

WORST = Layout(
    kind="groups",
    title="Accuracy on the worst group, %",
    rows=("split", "classifier", "fitted_on", "encoder"),
    labels={"split": "images of", "fitted_on": "fitted on", "worst": "worst group", "weighted": "weighted average"},
    details={
        "average": "over images",
        "weighted": "over groups, weighted as in train",
        BALANCED: "as many images of each group",
    },
    about="A group is a class with an attribute. The minimum of several accuracies is lower than the accuracy that is "
    "lowest in truth, the more so the smaller the groups are.",
    count="images",
    notes="which",
)
BY_GROUP = Layout(
    kind="group",
    title="Accuracy on each group, %",
    rows=("group", "classifier"),
    columns=("fitted_on", "encoder"),
    labels={BALANCED: "on balanced groups", "train": "on train"},
    count="images",
    chart=Chart(axis="group", series=("fitted_on", "encoder"), note="Bars are 95 % intervals over images."),
)


@dataclass(kw_only=True)
class Groups(Evaluation):
    """Accuracy on each group, on the worst one and on average, of ordinary classifiers and of group-balanced ones.

    Config keys: those of `suite.Evaluation`. `split` names the test split; null is the first whose groups are known.
    Ordinary classifiers are fitted on all training images. Group-balanced ones are fitted on as many images of each
    group as the smallest group has: on training images, or on those of the test split `balanced_from`, such as `val`.
    `subsets` is the number of such sets; the scores of their classifiers are averaged. A group without any image in the
    fitting set is left out there. Groups with less than `fewest` test images do not count as the worst.
    """

    split: str | None
    balanced_from: str
    subsets: PositiveInt
    fewest: PositiveInt

    @override
    def names(self, dataset: Dataset) -> list[str]:
        require_labels(dataset)
        split = self._split(dataset)
        fits = [f"{classifier}/{fitted_on}/{split}" for classifier in self.classifiers for fitted_on in self._fitted_on]
        return [*fits, *(f"groups/{metric}/{fit}" for metric in METRICS for fit in fits)]

    @property
    def _fitted_on(self) -> tuple[str, str]:
        return "train", BALANCED

    def _split(self, dataset: Dataset) -> str:
        """Return the name of the test split, after checking that the groups of all images that are used are known.

        Raises:
            UserError: they are not.
        """
        known = [] if dataset.attribute is None else [name for name in dataset.tests if name in dataset.attribute.of]
        if not known or dataset.groups("train") is None:
            raise UserError(
                f"{dataset.name} does not say which group an image belongs to; choose dataset=confounded, or "
                "dataset=wilds with a table of your own."
            )
        split = named_split(dataset, self.split or known[0])
        if split not in known:
            raise UserError(f"The groups of {split} are not known; set evaluation.split to one of {', '.join(known)}.")
        sizes = dataset.groups(split)
        assert sizes is not None
        large = int((sizes[sizes >= 0].bincount() >= self.fewest).sum())
        if large < 2:
            raise UserError(
                f"{split} of {dataset.name} has {large or 'no'} group{'' if large == 1 else 's'} of {self.fewest} "
                "images or more, and two are needed; take more test images, or set evaluation.fewest lower."
            )
        others = [name for name in known if name != split]
        if self.balanced_from not in ("train", *others):
            raise UserError(
                f"evaluation.balanced_from={self.balanced_from} is not possible; choose one of "
                f"{', '.join(('train', *others))}."
            )
        return split

    @override
    def measure(self, task: Task, results: Results) -> None:
        dataset, name = task.dataset, self._split(task.dataset)
        split, own = dataset.tests[name], dataset.groups(name)
        assert own is not None
        tests = {name: task.features(split, name)}
        train = task.features(dataset.train, "train")
        for fit, scores in self.scores(task, "train", train, dataset.train.labels, tests, results):
            self._record(task, fit, name, scores[name], own, results)
        bank, labels = train, dataset.train.labels
        if self.balanced_from != "train":
            source = dataset.tests[self.balanced_from]
            bank, labels = task.features(source, self.balanced_from), source.labels
        for classifier, values in self._balanced(task, bank, labels.to(task.device), tests[name]).items():
            self._record(task, Fit(task.encoder, classifier, BALANCED), name, values.cpu(), own, results)

    def _balanced(self, task: Task, bank: Tensor, labels: Tensor, queries: Tensor) -> Mapping[Classifier, Tensor]:
        """Return class scores (n, K) of classifiers fitted on balanced groups, the mean over the subsets."""
        groups, classes = task.dataset.groups(self.balanced_from), len(task.dataset.classes)
        assert groups is not None
        total: dict[Classifier, Tensor] = {}
        for subset in range(self.subsets):
            index = balanced_groups(groups, task.seed, subset).to(task.device)
            scores, _ = self.fit(bank[index], labels[index], queries, classes, task.seed)
            total = {one: values + total.get(one, 0.0) for one, values in scores.items()}
        return {one: values / self.subsets for one, values in total.items()}

    def _record(self, task: Task, fit: Fit, split: str, scores: Tensor, groups: Tensor, results: Results) -> None:
        """Record the accuracies of class scores (n, K) of images of `groups` (n,)."""
        dataset, bootstrap = task.dataset, task.bootstrap
        labels = dataset.tests[split].labels.cpu()
        predicted = scores.argmax(1)
        keep_predictions(fit, split, predicted, labels, results)
        record_accuracy(task, fit, split, scores, labels, results)
        train, names = dataset.groups("train"), dataset.group_names
        assert train is not None
        hits = {g: (predicted == labels)[groups == g] for g in sorted(set(groups[groups >= 0].tolist()))}
        large = {g: part for g, part in hits.items() if len(part) >= self.fewest}
        worst = min(large, key=lambda g: float(large[g].float().mean()))
        shares = torch.stack([(train == g).sum() for g in hits]).float()
        found = {
            "worst": bootstrap.of_parts(list(large.values()), lambda means: means.amin(0)),
            "average": bootstrap.mean(torch.cat(list(hits.values()))),
        }
        if shares.sum() > 0:
            found["weighted"] = bootstrap.of_parts(list(hits.values()), lambda means: shares / shares.sum() @ means)
        few = len(hits) - len(large)
        notes = {
            "worst": f"{names[worst]} ({len(large[worst])} images)",
            "average": f"{few} with fewer than {self.fewest} images do not count" if few else "",
        }
        record = partial(Measurement, kind=WORST.kind, split=split, n=int((groups >= 0).sum()), **fit._asdict())
        for metric, interval in found.items():
            results.records.add(WORST, record(metric=metric, note=notes.get(metric, ""), **interval._asdict()))
        for g, part in hits.items():
            record = partial(Measurement, kind=BY_GROUP.kind, split=split, n=len(part), **fit._asdict())
            results.records.add(BY_GROUP, record(factors={"group": names[g]}, **bootstrap.mean(part)._asdict()))


def balanced_groups(groups: Tensor, seed: int, subset: int) -> Tensor:
    """Return the positions (int64, ascending) of as many images of each group as the smallest has, drawn at random.

    `groups` is int64 (N,); images of a negative group are left out, and groups without images do not count.
    """
    counts = groups[groups >= 0].bincount()
    smallest = int(counts[counts > 0].min())
    return some_of_each(groups, smallest, permutation(seed, _SUBSET - subset, len(groups)))
