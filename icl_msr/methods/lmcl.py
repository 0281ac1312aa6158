"""LMCL: Chen et al. Large-Margin Contrastive Learning with Distance Polarization Regularizer. ICML 2021 (PMLR 139)."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.errors import UserError
from icl_msr.losses.contrastive import nt_xent
from icl_msr.losses.penalties import polarization
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp

Distance = Annotated[float, Field(ge=0, le=1)]


class LMCL(Method):
    """SimCLR with a margin between near and far pairs. No pair of the batch should have a distance inside the margin.

    This is a reconstruction: the authors published no code. Ours are the normalised distance, the mean over pairs, and
    the values of the thresholds and of the weight. Non-semantic negatives go through the online encoder without
    gradient and enter only NT-Xent (ours).
    """

    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        weight: NonNegativeFloat,
        delta_plus: Distance,
        delta_minus: Distance,
    ):
        if delta_plus >= delta_minus:
            raise UserError(
                f"method.delta_plus={delta_plus} is not below method.delta_minus={delta_minus}, so there is no margin "
                "between near and far; choose delta_plus < delta_minus."
            )
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.temperature: float = temperature
        self.weight = weight
        self.delta_plus, self.delta_minus = delta_plus, delta_minus

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return NT-Xent + lambda R (eq. 9)."""
        first, second = embeddings
        penalty = polarization(first, second, self.delta_plus, self.delta_minus)
        return nt_xent(first, second, self.temperature, targets.negatives, self.hard(step)) + self.weight * penalty
