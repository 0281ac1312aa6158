"""MoCo v3: Chen et al. An Empirical Study of Training Self-Supervised Vision Transformers. ICCV 2021 (2104.02057)."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import in_batch_nce
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import MomentumEncoder, rising_momentum


class MoCoV3(Method):
    """The prediction of one view finds the momentum projection of the other among those of the batch; no queue.

    Non-semantic negatives go through the momentum encoder (ours, after Ge et al. 2021).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        momentum: Annotated[float, Field(ge=0, le=1)],
        momentum_statistics: Literal["own", "online"],
        freeze_patches: bool,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim, norm_last=True)
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim, norm_last=True)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum_statistics)
        self.temperature: float = temperature
        self.momentum = momentum
        self.freeze_patches = freeze_patches

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Keys k of both views."""
        features = self.momentum_encoder.backbone(torch.cat(views.views))
        keys = self.momentum_encoder.projector(features)
        negatives = embed_negatives(views.negatives, self.momentum_encoder, self)
        return Targets(list(features.chunk(2)), list(keys.chunk(2)), negatives)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Queries q of both views, each the prediction from a projection."""
        return list(self.predictor(self.projector(torch.cat(list(features)))).chunk(2))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """ctr(q1, k2) + ctr(q2, k1), each scaled by 2 tau (algorithm 1)."""
        (first, second), (key_first, key_second) = embeddings, targets.embeddings
        return (2 * self.temperature) * (
            in_batch_nce(first, key_second, self.temperature, targets.negatives)
            + in_batch_nce(second, key_first, self.temperature, targets.negatives)
        )

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Each view's query against the other's key."""
        head = self.momentum_encoder.projector
        return [Pair(embeddings[i], targets.embeddings[j], targets.features[j], head) for i, j in ((0, 1), (1, 0))]

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """A transformer keeps its random patch projection, which makes training stable (section 4.2)."""
        if not self.freeze_patches:
            return ()
        return [p for name, p in self.backbone.named_parameters() if "patch_embed" in name]

    def advance(self, step: Step) -> None:
        """The momentum encoder follows, ever more slowly."""
        momentum = rising_momentum(self.momentum, step.progress)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum)
