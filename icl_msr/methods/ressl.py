"""ReSSL: Zheng et al. Relational Self-Supervised Learning with Weak Augmentation. NeurIPS 2021 (arXiv 2107.09282)."""

from collections.abc import Sequence

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.regression import repulsion
from icl_msr.losses.relational import relation
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Queue, Statistics


class ReSSL(Method):
    """Trains a student to relate an image's strong view to earlier images as a teacher relates its weak view.

    There is one direction, as in the paper: the student sees the first view, the teacher the second. Non-semantic
    negatives go through the teacher and are repelled from the student's embedding (ours).
    """

    online_views, target_views = slice(1), slice(1, 2)
    queue: Queue

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        teacher_temperature: PositiveFloat,
        queue_size: PositiveInt,
        momentum: Momentum,
        momentum_statistics: Statistics,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics)
        self.queue = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature
        self.teacher_temperature = teacher_temperature

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the cross entropy of the two relations to the queue (section 3.2)."""
        (student,), (teacher,) = embeddings, targets.embeddings
        attraction = relation(student, teacher, self.queue.keys, self.temperature, self.teacher_temperature)
        return attraction - repulsion(student, targets.negatives)
