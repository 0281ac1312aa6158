"""A control of ICL-MSR: a stratum that is read off the masks instead of learnt.

The stratum is the part of the channels that move least when the background of an image is swapped. It takes the place
of f_msr's strata in L_msr, and everything else stays. If this control does not help either, the objective fails; if it
helps and f_msr does not, f_msr's signal fails.

    python -m icl_msr.run 'hydra.searchpath=[file://experiments/sight/conf]' regularizer=oracle
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.augment import Background
from icl_msr.core.config import Seed
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys, permutation
from icl_msr.core.views import Views
from icl_msr.data.crops import boxes_around
from icl_msr.data.dataset import ArraySplit, Dataset, normalise
from icl_msr.methods.base import Output, Step
from icl_msr.models.backbones import Backbone, evaluating
from icl_msr.regularizers import MetaSemanticRegularizer, Pass, Regularizer

SWAP = Background(fill="image", weight=[1.0, 1.0], probability=1.0, softness=0.0, views=[0])


class OracleStrata(Regularizer):
    """L_msr with one stratum: the `share` of the channels that move least when the background is swapped.

    Until it is read off for the first time, after the first step, the stratum is uniform.

    Args:
        channels: number of channels c of the features.
        method_temperature: temperature of the method, if it has one.
        dataset: the data set, whose training images have masks.
        share: of the channels that the stratum keeps.
        every: steps after which it is read off again.
        images: number of training images that it is read off.
        lam: lambda, weight of L_msr.
        seed: of the sample of images and of their new backgrounds.

    Raises:
        UserError: the training images have no masks in memory.
    """

    def __init__(
        self,
        channels: int,
        method_temperature: float | None,
        dataset: Dataset,
        *,
        share: Annotated[float, Field(gt=0, le=1)],
        every: PositiveInt,
        images: PositiveInt,
        lam: NonNegativeFloat,
        seed: Seed,
    ):
        super().__init__()
        train = dataset.train
        if not isinstance(train, ArraySplit) or train.masks is None:
            raise UserError(f"The oracle needs masks in memory, and {dataset.name} has none; type regularizer=msr.")
        self.msr = MetaSemanticRegularizer.with_defaults(
            channels, method_temperature, seed=seed, weights="ones", lam=lam
        )
        self.kept, self.every = max(1, round(share * channels)), every
        order = permutation(seed, 0, len(train))
        sample, others = order[:images], order.roll(1)[:images]
        swapped = SWAP(
            train.images[sample],
            train.masks[sample],
            train.images[others],
            boxes_around(train.masks[others]),
            keys(seed, 0, sample, 0),
        )
        self.register_buffer("own", normalise(train.images[sample], dataset.mean, dataset.std), persistent=False)
        self.register_buffer("swapped", normalise(swapped, dataset.mean, dataset.std), persistent=False)

    @override
    def forward(self, views: Views, output: Output, step: Step) -> Tensor:
        loss: Tensor = self.msr(views, output, step)
        return loss

    @override
    @torch.no_grad()
    def before_step(self, batch: Pass) -> dict[str, Tensor]:
        if batch.step.index % self.every:
            return {}
        moved = self.moved(batch.method.backbone)
        least = moved.argsort()[: self.kept]
        stratum = F.normalize(torch.zeros_like(moved).index_fill(0, least, 1), dim=0)
        self.msr.get_buffer("fixed").copy_(stratum)
        alive = moved[moved.isfinite()]
        return {"oracle/moved": alive.mean(), "oracle/moved_kept": moved[least].mean()}

    def moved(self, backbone: Backbone) -> Tensor:
        """Return the mean squared change of each channel (c,) in a swap, over its variance; inf for a dead channel."""
        with evaluating(backbone):
            own, swapped = backbone(self.get_buffer("own")), backbone(self.get_buffer("swapped"))
        variance = own.var(0)
        alive = variance > 1e-8 * variance.amax()
        change: Tensor = (swapped - own).square().mean(0) / variance
        return change.where(alive, torch.inf)
