"""ReLIC: Mitrovic et al. Representation Learning via Invariant Causal Mechanisms. ICLR 2021 (arXiv 2010.07922)."""

from collections.abc import Mapping, Sequence

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import in_batch_nce
from icl_msr.losses.penalties import invariance
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Statistics


class ReLIC(Method):
    """Contrasts each view with the target of the other, and makes both distributions over the batch agree.

    The projector is the paper's critic g. Ours: the target network has its own projector, which follows the trained one
    (as in BYOL). Both directions are averaged. Non-semantic negatives go through the target network and enter only the
    discrimination.
    """

    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        alpha: NonNegativeFloat,
        momentum: Momentum,
        momentum_statistics: Statistics,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics, rising=True)
        self.temperature: float = temperature
        self.alpha = alpha

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return instance discrimination + alpha KL of the two distributions (section 3)."""
        (first, second), (key_first, key_second) = embeddings, targets.embeddings
        discrimination = (
            in_batch_nce(first, key_second, self.temperature, targets.negatives, self.hard(step))
            + in_batch_nce(second, key_first, self.temperature, targets.negatives, self.hard(step))
        ) / 2
        return discrimination + self.alpha * invariance(first, second, key_first, key_second, self.temperature)
