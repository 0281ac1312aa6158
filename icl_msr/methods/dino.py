"""DINO: Caron et al. Emerging Properties in Self-Supervised Vision Transformers. ICCV 2021 (arXiv 2104.14294)."""

from collections.abc import Iterable, Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.core.distributed import average
from icl_msr.losses.clustering import cosines, self_distillation
from icl_msr.losses.contrastive import unit
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Statistics


class Head(nn.Module):
    """Three layers to bottleneck embeddings (N, D). The last, weight-normalised layer is its `prototypes` (K, D)."""

    def __init__(self, channels: int, hidden_dim: int, embedding_dim: int, prototypes: int, batch_norm: bool):
        super().__init__()
        self.mlp = mlp(channels, hidden_dim, hidden_dim, embedding_dim, norm=batch_norm, activation=nn.GELU)
        self.prototypes = nn.Parameter(unit(torch.randn(prototypes, embedding_dim)))

    def forward(self, features: Tensor) -> Tensor:
        """Return bottleneck embeddings, not yet of unit length: (N, c) to (N, D)."""
        embeddings: Tensor = self.mlp(features)
        return embeddings


class DINO(Method):
    """Trains a student on all views to predict a momentum teacher's assignment of the other global view.

    The teacher follows more and more slowly (section 3.1). The regularizer compares the bottleneck embeddings of the
    two global views. Non-semantic negatives go through the teacher and are repelled from these embeddings (both ours).
    So the cosines have D dimensions, for any number of prototypes.
    """

    takes = (2, 12)
    centre: Tensor
    projector: Head
    momentum_encoder: MomentumEncoder

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        prototypes: PositiveInt,
        batch_norm: bool,
        freeze_epochs: NonNegativeFloat,
        temperature: PositiveFloat,
        teacher_temperature: PositiveFloat,
        warmup_teacher_temperature: PositiveFloat,
        warmup_epochs: NonNegativeFloat,
        centre_momentum: Momentum,
        momentum: Momentum,
        momentum_statistics: Statistics,
    ):
        super().__init__(backbone, Head(backbone.channels, hidden_dim, embedding_dim, prototypes, batch_norm))
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics, rising=True)
        self.register_buffer("centre", torch.zeros(prototypes))
        self.temperature: float = temperature
        self.teacher_temperatures, self.warmup_epochs = (warmup_teacher_temperature, teacher_temperature), warmup_epochs
        self.freeze_epochs, self.centre_momentum = freeze_epochs, centre_momentum

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the cross entropy of the student's scores with the teacher's, centred and sharpened (eq. 1-3)."""
        student = cosines(torch.stack(list(embeddings)), self.projector.prototypes)
        teacher = cosines(torch.stack(targets.embeddings), self.teacher_prototypes)
        temperatures = self.temperature, self.teacher_temperature(step)
        attraction = self_distillation(student, teacher, self.centre, *temperatures)
        first, second = embeddings[:2]
        return attraction - (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2

    @property
    def teacher_prototypes(self) -> Tensor:
        """Prototypes (K, D) of the teacher."""
        return self.momentum_encoder.projector.get_parameter("prototypes")

    def teacher_temperature(self, step: Step) -> float:
        """Return the teacher's temperature, which rises linearly and then stays constant (section 3.1)."""
        low, high = self.teacher_temperatures
        return high if step.epoch >= self.warmup_epochs else low + (high - low) * step.epoch / self.warmup_epochs

    @torch.no_grad()
    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Update the centre with the teacher's mean scores on all ranks (eq. 4), computed from its mean embedding."""
        (mean,) = average([unit(torch.cat(targets.embeddings)).mean(0)])
        scores = unit(self.teacher_prototypes) @ mean
        self.centre = torch.lerp(scores.to(self.centre.dtype), self.centre, self.centre_momentum)

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """Return the last layer in the first epochs."""
        return [self.projector.prototypes] if step.epoch < self.freeze_epochs else []
