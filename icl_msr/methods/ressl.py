"""ReSSL: Zheng et al. Relational Self-Supervised Learning with Weak Augmentation. NeurIPS 2021 (arXiv 2107.09282)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.views import Views
from icl_msr.losses.regression import repulsion
from icl_msr.losses.relational import relation
from icl_msr.methods.base import Method, Pair, Step, Targets, embed_negatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import MomentumEncoder, Queue


class ReSSL(Method):
    """A student, shown the strong view, relates an image to earlier ones as its momentum teacher does from the weak.

    One direction, as in the paper: the first view is the student's. Non-semantic negatives go through the teacher and
    are repelled from the student's embedding (ours).
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        teacher_temperature: PositiveFloat,
        queue_size: PositiveInt,
        momentum: Annotated[float, Field(ge=0, le=1)],
        momentum_statistics: Literal["own", "online"],
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.channels, hidden_dim, embedding_dim)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum_statistics)
        self.queue = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature
        self.teacher_temperature = teacher_temperature
        self.momentum = momentum

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """The teacher's embeddings of the weak view."""
        features = self.momentum_encoder.backbone(views.views[1])
        embeddings = self.momentum_encoder.projector(features)
        return Targets([features], [embeddings], embed_negatives(views.negatives, self.momentum_encoder, self))

    def encode(self, views: Views) -> list[Tensor]:
        """Features of the strong view."""
        return [self.backbone(views.views[0])]

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's embeddings."""
        return [self.projector(features[0])]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Cross entropy of both relations to the queue (section 3.2)."""
        student, teacher = embeddings[0], targets.embeddings[0]
        attraction = relation(student, teacher, self.queue.keys, self.temperature, self.teacher_temperature)
        return attraction - repulsion(student, targets.negatives)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """One direction: the student's embeddings against the teacher's, the queue against both."""
        head = self.momentum_encoder.projector
        return [Pair(embeddings[0], targets.embeddings[0], targets.features[0], head, self.queue.keys)]

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """The teacher's embeddings enter the queue after the loss, so that no image is related to itself."""
        self.queue.push(targets.embeddings[0])

    def advance(self, step: Step) -> None:
        """The teacher follows."""
        self.momentum_encoder.follow(self.backbone, self.projector, self.momentum)
