"""MoCo v2: He et al. Momentum Contrast. CVPR 2020 (arXiv 1911.05722); Chen et al. 2020 (arXiv 2003.04297)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.distributed import collect, copy_from_first
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import info_nce, own_rows
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Queue, Statistics

NO_REGULARIZER = (
    "method.shuffle_batch_norm=true makes the loss depend on the number of devices, which regularizers do not allow "
    "for; add regularizer=none, or method.shuffle_batch_norm=false."
)
_DEAL = -7  # the `view` of the hash that deals out the keys


class MoCo(Method):
    """Contrasts a query of the first view with its key, of the second view, and a queue of earlier keys.

    A momentum encoder encodes the keys. Non-semantic negatives go through it too (Ge et al. 2021) and never enter the
    queue.

    By default, BatchNorm normalises the images of all ranks together, so that ranks are one process. With
    `shuffle_batch_norm` it is as in the paper (section 3.3): each rank normalises its own queries, and the keys are
    dealt out to the ranks in another order, so that a query and its key are normalised with different images. The
    result then depends on the number of ranks. Non-semantic negatives are not dealt out.
    """

    online_views, target_views = slice(1), slice(1, 2)
    queue: Queue
    momentum_encoder: MomentumEncoder

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
        shuffle_batch_norm: bool = False,
    ):
        if shuffle_batch_norm and batch_norm:
            raise UserError(
                "method.shuffle_batch_norm=true is for a projector without BatchNorm, as in the paper; type "
                "method.batch_norm=false."
            )
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim, norm=batch_norm))
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics)
        self.queue = Queue(queue_size, embedding_dim)
        self.temperature: float = temperature
        self.own_statistics = shuffle_batch_norm
        if shuffle_batch_norm:
            self.refuses = {"regularizer": NO_REGULARIZER}

    @override
    def targets(self, views: Views) -> Targets:
        if not self.own_statistics:
            return super().targets(views)
        n, index = len(views.index), collect(views.index)
        order = keys(0, 0, index + index.sum(), _DEAL).argsort(stable=True)  # another one for every batch
        here = own_rows(n, order.device)[:, 0]
        dealt = [collect(view)[order[here]] for view in views.views[self.target_views]]
        targets = super().targets(replace(views, views=[*views.views[:1], *dealt]))
        back = order.argsort()[here]
        targets.features = [collect(rows)[back] for rows in targets.features]
        targets.embeddings = [collect(rows)[back] for rows in targets.embeddings]
        return targets

    @override
    def advance(self, step: Step) -> None:
        super().advance(step)
        if self.own_statistics:  # as DistributedDataParallel does in the authors' code
            copy_from_first(itertools.chain(self.backbone.buffers(), self.momentum_encoder.buffers()))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return InfoNCE over the queue (eq. 1)."""
        (query,), (key,) = embeddings, targets.embeddings
        return info_nce(query, key, self.queue.keys, self.temperature, targets.negatives, self.hard(step))
