"""Fine-tuning of a copy of the encoder, with a linear head, on all labels or on some of them.

Kornblith et al., Do better ImageNet models transfer better?, CVPR 2019; with few labels: Chen et al., A simple
framework for contrastive learning of visual representations, ICML 2020, section 4.2.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms.v2 import functional as F
from typing_extensions import override

from icl_msr.augment import Augmentation
from icl_msr.augment.recipe import Interval, Probability
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import permutation
from icl_msr.core.records import Classifier
from icl_msr.data.dataset import Dataset, Split
from icl_msr.data.files import FileSplit
from icl_msr.data.sources import cores
from icl_msr.evaluation.features import extract, progress
from icl_msr.evaluation.labels import LABELS, Part, balanced_part, listed_part, names, percent, require_labels
from icl_msr.evaluation.linear import hold_out
from icl_msr.evaluation.subsets import crop_and_flip
from icl_msr.evaluation.suite import CHOICE, Evaluation, Fit, Fraction, Results, Task, choice, record_tests
from icl_msr.models.backbones import evaluating

OptimizerName = Literal["adamw", "sgd"]
TUNED = Classifier(family="finetune")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The recipe of fine-tuning. The learning rates follow a cosine to zero, without warm-up."""

    optimizer: OptimizerName
    """Name of the optimiser; SGD has momentum 0.9."""
    head_learning_rate: float
    weight_decay: float
    """Weight decay of weight matrices; biases and scales of normalisation layers have none."""
    epochs: int
    batch_size: int
    augmentation: Augmentation

    def build(self, encoder: nn.Module, head: nn.Module, rate: float, steps: int) -> tuple[Optimizer, LambdaLR]:
        """Build the optimiser, with the encoder's learning rate `rate`, and its schedule over `steps` steps."""
        groups = [
            {
                "params": [p for p in part.parameters() if (p.ndim > 1) == matrices],
                "lr": lr,
                "weight_decay": self.weight_decay if matrices else 0.0,
            }
            for part, lr in ((encoder, rate), (head, self.head_learning_rate))
            for matrices in (True, False)
        ]
        optimizer = AdamW(groups) if self.optimizer == "adamw" else SGD(groups, momentum=0.9)
        return optimizer, LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)


@torch.inference_mode(False)
@torch.enable_grad()
def fine_tune(
    encoder: nn.Module,
    dataset: Dataset,
    index: Tensor,
    recipe: Tuning,
    learning_rate: float,
    *,
    device: torch.device | str,
    seed: int,
    label: str = "fine-tuning",
) -> nn.Sequential | None:
    """Return a fine-tuned copy of `encoder` with a linear head; None if training diverged.

    It maps images (n, 3, S, S) to logits (n, K). It is trained on the images of the train split at `index` (N,), in
    batches whose sizes differ by at most one. The head begins at zero. Order and augmentation depend only on `seed` and
    on the positions of the images.
    """
    device, size = torch.device(device), dataset.image_size
    tuned = copy.deepcopy(encoder).to(device).requires_grad_(True)
    with evaluating(tuned), torch.no_grad():
        channels = tuned(torch.zeros(2, 3, size, size, device=device)).shape[1]
    head = skip_init(nn.Linear, channels, len(dataset.classes), device=device)  # type: ignore[no-untyped-call]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(tuned, head).to(memory_format=torch.channels_last).train()
    steps = math.ceil(len(index) / recipe.batch_size)
    optimizer, schedule = recipe.build(tuned, head, learning_rate, recipe.epochs * steps)
    labels = dataset.train.labels.to(device)
    own = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(own),  # for dropout in the encoder
        torch.backends.cudnn.flags(enabled=True, deterministic=True),
        progress(label, recipe.epochs * len(index)) as bar,
    ):
        torch.manual_seed(seed)
        for epoch in range(recipe.epochs):
            batches = index[permutation(seed, epoch, len(index))].tensor_split(steps)
            views = augmented(dataset, batches, recipe.augmentation, seed=seed, epoch=epoch, device=device)
            for batch, images in zip(batches, views, strict=True):
                logits = model(images)
                loss = cross_entropy(logits, labels[batch.to(device)])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.advance(len(batch))
            if not loss.isfinite():
                return None
    return model


def augmented(
    dataset: Dataset,
    batches: Sequence[Tensor],
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield the first augmented view of each batch of training images, given by positions (n,).

    A view is float32 (n, 3, S, S) on `device`. Photographs in files are cropped at their own resolution.
    """
    split, size = dataset.train, dataset.image_size
    sources: Iterator[Tensor] = map(split.load, batches)
    if isinstance(split, FileSplit):
        sources = _crops(split, batches, augmentation, seed, epoch, size)
    for batch, images in zip(batches, sources, strict=True):
        yield augmentation(
            images.to(device),
            batch.to(device),
            seed=seed,
            epoch=epoch,
            size=size,
            mean=dataset.mean,
            std=dataset.std,
            cropped=isinstance(split, FileSplit),
            memory_format=torch.channels_last,
        )[0]


def _crops(
    split: FileSplit, batches: Sequence[Tensor], augmentation: Augmentation, seed: int, epoch: int, size: int
) -> Iterator[Tensor]:
    """Yield the crops of each batch, uint8 (n, 3, S, S), decoded by threads, one batch ahead."""

    def cut(i: int) -> Tensor:
        image = split.image(i)
        (box,) = augmentation.crop_parameters(torch.tensor([i]), *image.shape[1:], seed=seed, epoch=epoch)
        crop: Tensor = F.resized_crop(image, *box[0].tolist(), [size, size], antialias=True)
        return crop

    with ThreadPoolExecutor(cores()) as pool:
        ahead = [pool.submit(cut, i) for i in batches[0].tolist()]
        for _, following in pairwise([*batches, torch.empty(0)]):
            now, ahead = ahead, [pool.submit(cut, i) for i in following.tolist()]
            yield torch.stack([crop.result() for crop in now])


@dataclass(kw_only=True)
class FineTuning(Evaluation):
    """Fine-tuning, and classifiers on frozen features, with all or some of the labels.

    Config keys: those of `suite.Evaluation`, for the frozen features. `fractions` are the parts of the labels to use,
    with balanced classes; `files` gives a list of images for each of them instead (see `labels`). `finetune` asks for
    fine-tuning. Its keys are `tune_optimizer`, `tune_learning_rates` of the encoder, `tune_head_learning_rate`,
    `tune_weight_decay`, `tune_epochs`, `tune_batch_size`, `tune_crop` (smallest and largest part of the area that a
    crop shows) and `tune_flip` (probability of a mirrored image). If there are several learning rates, one is chosen on
    the fraction `tune_held_out` of the images, before training on all of them. The run's seed also decides which images
    have labels. They are the same for all encoders.

    Several ranks do the same work, except for features of frozen encoders, which they share. Fine-tuning that diverges
    raises a `UserError`.
    """

    fractions: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    files: list[str] | None
    finetune: bool
    tune_optimizer: OptimizerName
    tune_learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    tune_head_learning_rate: PositiveFloat
    tune_weight_decay: NonNegativeFloat
    tune_epochs: PositiveInt
    tune_batch_size: Annotated[int, Field(ge=2)]
    tune_held_out: Fraction
    tune_crop: Interval
    tune_flip: Probability

    def __post_init__(self) -> None:
        if self.files is not None and len(self.files) != len(self.fractions):
            raise UserError(
                f"evaluation.files and evaluation.fractions have {len(self.files)} and {len(self.fractions)} entries; "
                "give a list for each fraction."
            )
        if self.files is not None and 1 in self.fractions:
            raise UserError(
                "evaluation.files lists some of the images, and evaluation.fractions=[1.0] is all of them; say which "
                "part is listed, as in evaluation.fractions=[0.01]."
            )
        if len(set(self.fractions)) < len(self.fractions):
            raise UserError(f"evaluation.fractions={self.fractions} has an entry twice; keep one.")

    @override
    def names(self, dataset: Dataset) -> list[str]:
        fitted = [*self.classifiers, *([TUNED] if self.finetune else [])]
        return [
            f"{replace(classifier, fraction=part.fraction)}/train/{split}"
            for part in self._parts(dataset, 0)
            for classifier in fitted
            for split in dataset.tests
        ]

    @override
    def measure(self, task: Task, results: Results) -> None:
        dataset, labels = task.dataset, task.dataset.train.labels.cpu()
        frozen = {"train": dataset.train, **dataset.tests} if self.classifiers else {}
        features = {name: task.features(split, name) for name, split in frozen.items()}
        for part in self._parts(dataset, task.seed):
            known = results.records.where(LABELS.kind)
            results.records.add(LABELS, *(record for record in part.records(labels) if record not in known))
            if part.file:
                results.lists[part.file] = names(dataset.train, part.index)
            if features:
                bank, tests = features["train"][part.index.to(task.device)], {k: features[k] for k in dataset.tests}
                fitted = self.scores(task, "train", bank, labels[part.index], tests, results, part.fraction)
                for fit, scores in fitted:
                    record_tests(task, fit, scores, results)
            if self.finetune:
                fit = Fit(task.encoder, replace(TUNED, fraction=part.fraction), "train")
                record_tests(task, fit, self._tuned(task, part, fit, results), results)

    def _parts(self, dataset: Dataset, seed: int) -> list[Part]:
        require_labels(dataset)
        if self.files is None:
            return [balanced_part(dataset, fraction, seed) for fraction in self.fractions]
        lists = zip(self.fractions, self.files, strict=True)
        return [listed_part(dataset, fraction, Path(file)) for fraction, file in lists]

    def _tuned(self, task: Task, part: Part, fit: Fit, results: Results) -> dict[str, Tensor]:
        """Return the logits (n, K) of each test split from a copy that is trained with the best learning rate."""
        rates, dataset = sorted(set(self.tune_learning_rates)), task.dataset
        recipe = self.recipe

        def tune(index: Tensor, rate: float, doing: str) -> nn.Sequential | None:
            label = f"{task.encoder}, {percent(part.fraction)} of the labels, learning rate {rate:g}: {doing}"
            return fine_tune(
                task.network, dataset, index, recipe, rate, device=task.device, seed=task.seed, label=label
            )

        def logits(model: nn.Module, split: Split, index: Tensor | None = None) -> Tensor:
            return extract(
                model,
                split,
                mean=dataset.mean,
                std=dataset.std,
                device=task.device,
                batch_size=task.batch_size,
                label=f"{task.encoder}, fine-tuned: testing",
                index=index,
            )

        best = rates[0]
        if len(rates) > 1:
            rest, held = (part.index[chosen] for chosen in hold_out(len(part.index), self.tune_held_out, task.seed))
            found: dict[float, tuple[float, float]] = {}
            for rate in rates:
                model = tune(rest, rate, "choosing it")
                if model is None:
                    found[rate] = (0.0, -math.inf)
                    continue
                scores, labels = logits(model, dataset.train, held), dataset.train.labels.cpu()[held]
                right = (scores.argmax(1) == labels).float().mean().item()
                found[rate] = (right, -cross_entropy(scores, labels).item())
            best = max(rates, key=found.__getitem__)
            accuracies = {rate: right for rate, (right, _) in found.items()}
            results.records.add(CHOICE, *choice(fit, best, accuracies, "tune_learning_rates"))
        model = tune(part.index, best, "fine-tuning")
        if model is None:
            raise UserError(
                f"Fine-tuning diverged at the learning rates {best:g} of the encoder and "
                f"{self.tune_head_learning_rate:g} of the head; lower evaluation.tune_learning_rates or "
                "evaluation.tune_head_learning_rate."
            )
        return {name: logits(model, split) for name, split in dataset.tests.items()}

    @property
    def recipe(self) -> Tuning:
        """The recipe of fine-tuning."""
        return Tuning(
            optimizer=self.tune_optimizer,
            head_learning_rate=self.tune_head_learning_rate,
            weight_decay=self.tune_weight_decay,
            epochs=self.tune_epochs,
            batch_size=self.tune_batch_size,
            augmentation=crop_and_flip(self.tune_crop, self.tune_flip),
        )
