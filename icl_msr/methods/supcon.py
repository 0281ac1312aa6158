"""SupCon: Khosla et al. Supervised Contrastive Learning. NeurIPS 2020 (arXiv 2004.11362)."""

from collections.abc import Mapping, Sequence

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import supervised_contrastive
from icl_msr.methods.base import Method, Step, Targets
from icl_msr.methods.supervised import require_classes
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp


class SupCon(Method):
    """SimCLR with the true labels: attracts all views of a class and repels all other views in the batch.

    It takes two or more views. Images without a label attract their own views only (ours). Non-semantic negatives go
    through the online encoder without gradient (ours).
    """

    takes = (2, 16)
    refuses: Mapping[str, str] = {
        "regularizer": "regularizers repel all other images of a batch, also those of the same class, which supcon "
        "attracts; add regularizer=none, or choose another method.",
        "hard_negatives": "the other views in a denominator of supcon are positives too; add hard_negatives=none, or "
        "choose another method.",
    }

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
    ):
        require_classes("supcon", classes)
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, embedding_dim))
        self.classes = classes
        self.temperature: float = temperature

    @override
    def targets(self, views: Views) -> Targets:
        targets = super().targets(views)
        targets.labels = views.labels
        return targets

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return L_out (eq. 2)."""
        assert targets.labels is not None
        return supervised_contrastive(embeddings, targets.labels, self.classes, self.temperature, targets.negatives)
