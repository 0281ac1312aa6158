"""SimCLR: Chen et al. A Simple Framework for Contrastive Learning. ICML 2020 (arXiv 2002.05709)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import nt_xent
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class SimCLR(Method):
    """Two views of an image attract each other; all other views in the batch repel.

    Non-semantic negatives go through the online encoder without gradient (ours: SimCLR has no key encoder).
    """

    def __init__(
        self, backbone: Backbone, *, hidden_dim: PositiveInt, embedding_dim: PositiveInt, temperature: PositiveFloat
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.temperature: float = temperature

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """z = g(h), both views in one batch."""
        return list(self.projector(torch.cat(list(features))).chunk(len(features)))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """NT-Xent (eq. 1)."""
        first, second = embeddings
        return nt_xent(first, second, self.temperature, targets.negatives)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view against the other."""
        return [
            Pair(anchor=embeddings[i], key=embeddings[j], key_features=features[j], head=self.projector)
            for i, j in ((0, 1), (1, 0))
        ]
