"""Debiased contrastive learning: Chuang et al. NeurIPS 2020 (arXiv 2007.00224)."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import debiased
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class Debiased(Method):
    """SimCLR that corrects for negatives of the anchor's class, whose expected share is tau+.

    With `hard_negatives=hcl` it is Robinson et al., "Contrastive Learning with Hard Negative Samples" (ICLR 2021, arXiv
    2010.04592).

    The "DCL" in the ImageNet-100 table of ICL-MSR is this method and not the decoupled `dcl`. Non-semantic negatives go
    through the online encoder without gradient (ours).
    """

    refuses: Mapping[str, str] = {
        "synthetic": "debiased contrastive learning subtracts the expected share of the anchor's class from the sum "
        "over the negatives, and a synthetic one has no class; add hard_negatives=none or hcl, or choose another "
        "method.",
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        tau_plus: Annotated[float, Field(ge=0, lt=1)],
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.temperature: float = temperature
        self.tau_plus = tau_plus

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return L_Debiased with one positive (eq. 8, M = 1)."""
        first, second = embeddings
        return debiased(first, second, self.temperature, self.tau_plus, targets.negatives, self.hard(step))
