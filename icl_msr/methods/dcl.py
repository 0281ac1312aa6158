"""DCL and DCLW: Yeh et al. Decoupled Contrastive Learning. ECCV 2022 (arXiv 2110.06848)."""

from collections.abc import Mapping, Sequence

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import decoupled
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class DCL(Method):
    """SimCLR without the positive in the denominator.

    With the positive there, the gradients of positive and negatives are coupled, which slows learning in small batches.
    A number for `sigma` selects DCLW. Non-semantic negatives go through the online encoder without gradient (ours).
    """

    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        sigma: PositiveFloat | None,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.temperature: float = temperature
        self.sigma = sigma

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return L_DC, or L_DCW (eq. 6, 7)."""
        first, second = embeddings
        return decoupled(first, second, self.temperature, self.sigma, targets.negatives, self.hard(step))
