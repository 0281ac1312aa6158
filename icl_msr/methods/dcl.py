"""DCL and DCLW: Yeh et al. Decoupled Contrastive Learning. ECCV 2022 (arXiv 2110.06848)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import decoupled
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class DCL(Method):
    """SimCLR without the positive in the denominator, which couples both and slows learning in small batches.

    A number for `sigma` makes it DCLW. Non-semantic negatives go through the online encoder without gradient (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        sigma: PositiveFloat | None,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.temperature: float = temperature
        self.sigma = sigma

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """z of both views."""
        return list(self.projector(torch.cat(list(features))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """L_DC, or L_DCW (eq. 6, 7)."""
        first, second = embeddings
        return decoupled(first, second, self.temperature, self.sigma, targets.negatives)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view against the other."""
        return [Pair(embeddings[i], embeddings[j], features[j], self.projector) for i, j in ((0, 1), (1, 0))]
