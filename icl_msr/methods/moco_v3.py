"""MoCo v3: Chen et al. An Empirical Study of Training Self-Supervised Vision Transformers. ICCV 2021 (2104.02057)."""

from collections.abc import Iterable, Mapping, Sequence

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from icl_msr.losses.contrastive import in_batch_nce
from icl_msr.methods.base import Method, Step, Targets, through
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.momentum import Momentum, MomentumEncoder, Statistics


class MoCoV3(Method):
    """Contrasts the prediction of one view with the momentum projections of the batch's other views, without a queue.

    Non-semantic negatives go through the momentum encoder (ours, after Ge et al. 2021).
    """

    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        *,
        hidden_dim: PositiveInt,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        momentum: Momentum,
        momentum_statistics: Statistics,
        freeze_patches: bool,
    ):
        super().__init__(backbone, mlp(backbone.channels, hidden_dim, hidden_dim, embedding_dim, norm_last=True))
        self.predictor = mlp(embedding_dim, hidden_dim, embedding_dim, norm_last=True)
        self.momentum_encoder = MomentumEncoder(backbone, self.projector, momentum, momentum_statistics, rising=True)
        self.temperature: float = temperature
        self.freeze_patches = freeze_patches

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return queries q of both views: predictions from projections."""
        return through(lambda h: self.predictor(self.projector(h)), features)

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return ctr(q1, k2) + ctr(q2, k1), each scaled by 2 tau (algorithm 1)."""
        (first, second), (key_first, key_second) = embeddings, targets.embeddings
        return (2 * self.temperature) * (
            in_batch_nce(first, key_second, self.temperature, targets.negatives, self.hard(step))
            + in_batch_nce(second, key_first, self.temperature, targets.negatives, self.hard(step))
        )

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """Return a transformer's patch projection. It stays random, which makes training stable (section 4.2)."""
        if not self.freeze_patches:
            return ()
        return [p for name, p in self.backbone.named_parameters() if "patch_embed" in name]
