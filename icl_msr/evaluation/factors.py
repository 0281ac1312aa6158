"""Accuracy by factors of variation that people annotated: pose, background, colour, and others of ImageNet-X.

Idrissi et al., ImageNet-X: understanding model mistakes with factor of variation annotations, ICLR 2023. They publish
lines of JSON with `file_name`, `class`, and 0 or 1 for each of 16 factors. The error ratio is the error on the images
with a factor divided by the error on all annotated images.
"""

import json
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from icl_msr.core.errors import UserError
from icl_msr.core.records import Chart, Layout, Measurement
from icl_msr.core.storage import expanded, readable
from icl_msr.data.dataset import ArraySplit, Dataset, Split
from icl_msr.data.files import FileSplit
from icl_msr.evaluation.labels import require_labels
from icl_msr.evaluation.suite import Evaluation, Fit, Results, Task, keep_predictions, named_split, record_accuracy

PUBLISHED = "imagenet_x_val_top_factor.jsonl"
"""The file of the package imagenet-x: of each image, the factor that its annotator found most telling."""

FACTORS = Layout(
    kind="factors",
    title="Accuracy by factor of variation, %",
    rows=("factor", "classifier"),
    columns=("encoder", "metric"),
    labels={"error_ratio": "error ratio"},
    about="The error ratio is the error on the images with a factor divided by the error on all annotated images.",
    count="images",
    chart=Chart(
        axis="factor",
        series=("classifier", "encoder"),
        where={"metric": "error_ratio"},
        note="Error ratio; above 1, images with the factor are harder. Bars are 95 % intervals over images.",
    ),
)


@dataclass(kw_only=True)
class Factors(Evaluation):
    """Accuracy of classifiers fitted on the training images, on the test images with each annotated factor.

    Config keys: those of `suite.Evaluation`. `annotations` is a file of lines of JSON; null takes the one of the
    package imagenet-x. Images are found by the names of their files. `split` names the test split; null is the first.
    """

    annotations: str | None
    split: str | None

    @override
    def names(self, dataset: Dataset) -> list[str]:
        require_labels(dataset)
        name = named_split(dataset, self.split)
        factors, _ = annotated(self._file(), dataset.tests[name])
        fits = [f"{classifier}/train/{name}" for classifier in self.classifiers]
        return [*fits, *(f"factors/{fit}/{factor}" for fit in fits for factor in factors)]

    def _file(self) -> Path:
        if self.annotations is not None:
            return expanded(self.annotations)
        package = find_spec("imagenet_x")
        if package is None or not package.submodule_search_locations:
            raise UserError(
                "evaluation=factors needs annotations; type pip install imagenet-x, or set evaluation.annotations to a "
                ".jsonl file."
            )
        return Path(package.submodule_search_locations[0], "annotations", PUBLISHED)

    @override
    def measure(self, task: Task, results: Results) -> None:
        dataset, name = task.dataset, named_split(task.dataset, self.split)
        split, train = dataset.tests[name], dataset.train
        factors, table = annotated(self._file(), split)
        bank, tests = task.features(train, "train"), {name: task.features(split, name)}
        labels = split.labels.cpu()
        for fit, scores in self.scores(task, "train", bank, train.labels, tests, results):
            predicted = scores[name].argmax(1)
            keep_predictions(fit, name, predicted, labels, results)
            record_accuracy(task, fit, name, scores[name], labels, results)
            known = table[:, 0] >= 0
            self._record(task, fit, name, factors, (predicted == labels)[known], table[known] == 1, results)

    def _record(
        self, task: Task, fit: Fit, split: str, factors: list[str], hits: Tensor, table: Tensor, results: Results
    ) -> None:
        """Record the accuracy for each factor, from correct predictions (n,) and factors bool (n, F)."""
        for factor, has in zip(factors, table.T, strict=True):
            wrong = ~hits
            record = partial(Measurement, kind=FACTORS.kind, split=split, n=int(has.sum()), **fit._asdict())
            record = partial(record, factors={"factor": factor})
            results.records.add(FACTORS, record(**task.bootstrap.mean(hits[has])._asdict()))
            if wrong.any():
                ratio = task.bootstrap.jointly([wrong & has, has, wrong], lambda mean: mean[0] / mean[1] / mean[2])
                results.records.add(FACTORS, record(metric="error_ratio", unit="number", **ratio._asdict()))


def annotated(file: Path, split: Split) -> tuple[list[str], Tensor]:
    """Return the factors (F) of the images of a split, most frequent first, and a table int64 (N, F) of 0 and 1.

    A row of -1 is an image without annotations. Factors that no image of the split has are left out.

    Raises:
        UserError: the file is missing or has another content, or none of the images are in it.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}; set evaluation.annotations to a .jsonl file of factors.")
    with readable(file, "set evaluation.annotations to lines of JSON as ImageNet-X publishes them"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        by_name = {row["file_name"]: row for row in rows}
        others = {"file_name", "class"}
        keys = [key for key in rows[0] if key not in others and all(row.get(key) in (0, 1) for row in rows)]
    files = split.files if isinstance(split, FileSplit | ArraySplit) else None
    found = [by_name.get(Path(name).name) for name in files or ()]
    if not any(found) or not keys:
        raise UserError(
            f"{file} has no factors of images of this test split; it lists names such as {next(iter(by_name))}. Choose "
            "the data set that was annotated, or another file in evaluation.annotations."
        )
    table = torch.tensor([[-1] * len(keys) if row is None else [int(row[key]) for key in keys] for row in found])
    counts = (table == 1).sum(0)
    order = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
    return [keys[k] for k in order], table[:, order]
