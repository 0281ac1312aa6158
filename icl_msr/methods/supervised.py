"""Supervised training with the true labels: the upper reference for encoders that never see them."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icl_msr.core.distributed import all_reduce_sum, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import full_precision
from icl_msr.methods.base import Method, Pair, Step, Targets, through
from icl_msr.models.backbones import Backbone


class Supervised(Method):
    """Trains a linear classifier with cross-entropy on every view. Images without a label are ignored."""

    takes = (1, 12)
    refuses: Mapping[str, str] = {
        "regularizer": "MSR reweights the positive of a contrastive pair, and supervised training has no pairs; "
        "add regularizer=none, or choose another method.",
        "negatives": "supervised training compares an image with classes and with no other image, so a negative has no "
        "place in it; add negatives=none, or choose another method.",
        "hard_negatives": "supervised training compares an image with no other image; add hard_negatives=none, or "
        "choose another method.",
    }

    def __init__(self, backbone: Backbone, classes: int):
        require_classes("supervised", classes)
        super().__init__(backbone)
        self.classifier = nn.Linear(backbone.channels, classes)

    def targets(self, views: Views) -> Targets:
        """Return the labels."""
        return Targets(labels=views.labels)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return logits (N, classes) of each view."""
        return through(self.classifier, features)

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the cross-entropy, averaged over views."""
        assert targets.labels is not None
        return labelled_cross_entropy(torch.cat(list(embeddings)), targets.labels.repeat(len(embeddings)))

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return an empty list, because no image is compared with another."""
        return []


def require_classes(method: str, classes: int) -> None:
    """Check that a method can tell classes apart.

    Raises:
        UserError: there are fewer than two.
    """
    if classes < 2:
        raise UserError(
            f"method={method} learns to tell classes apart, and the data set has {classes or 'no'} "
            f"class{'' if classes == 1 else 'es'}; choose another dataset, or a method that needs no labels."
        )


@full_precision
def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, averaged over the labelled rows of all ranks; 0 if there are none.

    Args:
        logits: (N, classes).
        labels: (N,) int64; -1: unlabelled.

    Returns:
        () W times this rank's sum, divided by the labelled rows of all ranks. So the mean over ranks is the loss of one
        process.
    """
    precise = logits.float() if logits.dtype.itemsize < 4 else logits
    total = F.cross_entropy(precise, labels, ignore_index=-1, reduction="sum")
    labelled = all_reduce_sum((labels >= 0).sum())
    return world_size() * total / labelled.clamp(min=1)
