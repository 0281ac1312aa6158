"""SimCLR: Chen et al. A Simple Framework for Contrastive Learning. ICML 2020 (arXiv 2002.05709)."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import nt_xent
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class SimCLR(Method):
    """Attracts the two views of an image and repels all other views in the batch.

    With more than two views, the loss is the mean over all pairs of views, as in the code of W-MSE.
    `augment.views=[{},{},{},{}]` makes four views. Regularizers see the first two.

    Non-semantic negatives go through the online encoder without gradient (ours: SimCLR has no key encoder).
    """

    takes = (2, 16)
    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        batch_norm_last: bool,
        temperature: PositiveFloat,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim, norm_last=batch_norm_last))
        self.temperature: float = temperature

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return NT-Xent (eq. 1), averaged over the pairs of views."""
        pairs, negatives, hard = itertools.combinations(embeddings, 2), targets.negatives, self.hard(step)
        return torch.stack([nt_xent(*pair, self.temperature, negatives, hard) for pair in pairs]).mean()
