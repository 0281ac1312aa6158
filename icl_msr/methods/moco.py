"""MoCo v2: He et al. Momentum Contrast. CVPR 2020 (arXiv 1911.05722); Chen et al. 2020 (arXiv 2003.04297)."""

from collections.abc import Mapping, Sequence

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import info_nce
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Queue, Statistics


class MoCo(Method):
    """Contrasts a query of the first view with its key, of the second view, and a queue of earlier keys.

    A momentum encoder encodes the keys. Non-semantic negatives go through it too (Ge et al. 2021) and never enter the
    queue.
    """

    online_views, target_views = slice(1), slice(1, 2)
    queue: Queue

    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        batch_norm: bool,
        temperature: PositiveFloat,
        queue_size: PositiveInt,
        momentum: Momentum,
        momentum_statistics: Statistics,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim, norm=batch_norm))
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics)
        self.queue = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return InfoNCE over the queue (eq. 1)."""
        (query,), (key,) = embeddings, targets.embeddings
        return info_nce(query, key, self.queue.keys, self.temperature, targets.negatives, self.hard(step))
