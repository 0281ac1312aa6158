"""Debiased contrastive learning: Chuang et al. NeurIPS 2020 (arXiv 2007.00224)."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import debiased
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class Debiased(Method):
    """SimCLR that expects a share tau+ of its negatives to be of the anchor's class and takes them out of the sum.

    This, not the decoupled `dcl`, is the "DCL" of the ImageNet-100 table of ICL-MSR. Non-semantic negatives go through
    the online encoder without gradient (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        tau_plus: Annotated[float, Field(ge=0, lt=1)],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.temperature: float = temperature
        self.tau_plus = tau_plus

    def targets(self, views: Views) -> Targets:
        """The embedded non-semantic negatives."""
        return Targets(negatives=embed_negatives(views.negatives, lambda t: self.projector(self.backbone(t)), self))

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """z of both views."""
        return list(self.projector(torch.cat(list(features))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """L_Debiased with one positive (eq. 8, M = 1)."""
        first, second = embeddings
        return debiased(first, second, self.temperature, self.tau_plus, targets.negatives)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view against the other."""
        return [Pair(embeddings[i], embeddings[j], features[j], self.projector) for i, j in ((0, 1), (1, 0))]
