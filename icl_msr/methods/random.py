"""The encoder as it was initialised, the lower reference: every learnt encoder must be better."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from icl_msr.methods.base import Method, Pair, Step, Targets
from icl_msr.models.backbones import Backbone


class RandomEncoder(Method):
    """Trains nothing. Only the running statistics of BatchNorm follow the images, as in every other method."""

    takes = (1, 12)
    refuses: Mapping[str, str] = {
        "regularizer": "a random encoder is not trained, so there is nothing to regularize; add regularizer=none, or "
        "choose another method.",
        "negatives": "a random encoder is not trained, so it takes no negatives; add negatives=none, or choose another "
        "method.",
        "hard_negatives": "a random encoder is not trained, so it has no negatives; add hard_negatives=none, or choose "
        "another method.",
    }

    def __init__(self, backbone: Backbone):
        super().__init__(backbone.requires_grad_(False))
        self.nothing = nn.Parameter(torch.zeros(()))
        """A parameter for the optimiser, which needs at least one."""

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return zero, with a gradient of zero."""
        return 0 * self.nothing

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return an empty list, because nothing is compared."""
        return []
