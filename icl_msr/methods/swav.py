"""SwAV: Caron et al. Unsupervised Learning of Visual Features by Contrasting Cluster Assignments. NeurIPS 2020
(arXiv 2006.09882).
"""

from collections.abc import Iterable, Sequence

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.losses.clustering import cosines, swapped_prediction
from icl_msr.losses.contrastive import unit
from icl_msr.losses.regression import repulsion
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Queue


class SwAV(Method):
    """Predicts the prototypes that a global view is assigned to from all other views, including local crops.

    The regularizer compares the projections of the two global views. Non-semantic negatives go through the online
    encoder without gradient and are repelled from these projections (both ours).
    """

    takes = (2, 12)

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        prototypes: PositiveInt,
        freeze_epochs: NonNegativeFloat,
        temperature: PositiveFloat,
        epsilon: PositiveFloat,
        sinkhorn_iterations: PositiveInt,
        queue_size: PositiveInt,
        queue_from_epoch: NonNegativeFloat,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.prototypes = nn.Parameter(unit(torch.randn(prototypes, embedding_dim)))
        self.first_queue, self.second_queue = Queue(queue_size, embedding_dim), Queue(queue_size, embedding_dim)
        self.temperature: float = temperature
        self.epsilon, self.iterations = epsilon, sinkhorn_iterations
        self.freeze_epochs, self.queue_from_epoch = freeze_epochs, queue_from_epoch

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the swapped prediction (eq. 1 and 2). A queue helps to assign a small batch evenly (section 4.1)."""
        scores = cosines(torch.stack(list(embeddings)), self.prototypes)
        queued = None
        if step.epoch >= self.queue_from_epoch:
            queues = torch.stack([self.first_queue.keys, self.second_queue.keys])
            queued = cosines(queues, self.prototypes.detach())
        attraction = swapped_prediction(scores, self.temperature, self.epsilon, self.iterations, queued)
        first, second = embeddings[:2]
        return attraction - (repulsion(first, targets.negatives) + repulsion(second, targets.negatives)) / 2

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Add the projections of each global view to its queue. The queue is full long before it is used."""
        self.first_queue.push(embeddings[0])
        self.second_queue.push(embeddings[1])

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """Return the prototypes in the first epochs, so that the projections first spread over random prototypes."""
        return [self.prototypes] if step.epoch < self.freeze_epochs else []

    @torch.no_grad()
    def advance(self, step: Step) -> None:
        """Normalise the prototypes. The loss sees only their direction, and longer prototypes would turn slower."""
        self.prototypes.copy_(unit(self.prototypes))
