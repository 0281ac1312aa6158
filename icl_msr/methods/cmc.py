"""CMC: Tian, Krishnan and Isola. Contrastive Multiview Coding. ECCV 2020 (arXiv 1906.05849)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.losses.contrastive import info_nce
from icl_msr.methods.base import Method, Pair, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.models.lab import LabBackbone
from icl_msr.models.momentum import Queue


class CMC(Method):
    """Contrasts the lightness L of an image with its colours ab, in both directions.

    Each has an encoder of half width, and both see the same augmented image. The paper augments an image once; we
    average the losses of two augmentations (ours). The paper's memory bank has an entry for each image, including the
    positive, and draws negatives at random. Ours are two queues of earlier embeddings; the positive is fresh and
    receives gradients too. Non-semantic negatives are compared with an anchor in the other colour space, as the
    positive is. They go through the trained encoders without gradient (ours).
    """

    takes = (1, 2)
    backbone: LabBackbone

    refuses: Mapping[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        hidden_dim: PositiveInt | None,
        embedding_dim: PositiveInt,
        temperature: PositiveFloat,
        queue_size: PositiveInt,
    ):
        super().__init__(LabBackbone(backbone, mean, std))
        widths = [self.channels, *([hidden_dim] if hidden_dim else []), embedding_dim]
        self.projector_l, self.projector_ab = mlp(*widths), mlp(*widths)
        self.queue_l, self.queue_ab = Queue(queue_size, embedding_dim), Queue(queue_size, embedding_dim)
        self.temperature: float = temperature

    @property
    def channels(self) -> int:
        """Channels of one colour space. Strata weight the channels of both encoders alike."""
        return self.backbone.channels // 2

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (N, 2 D), first of L, then of ab."""
        return torch.cat(self.project([self.backbone(images)]), dim=1)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return embeddings (N, D) of L, one per view, then those of ab."""
        lightness, colours = torch.cat(list(features)).chunk(2, dim=1)
        views = len(features)
        return [*self.projector_l(lightness).chunk(views), *self.projector_ab(colours).chunk(views)]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return the mean of InfoNCE in both directions (section 3.2; the paper sums the two)."""
        in_l = in_ab = targets.negatives
        if targets.negatives is not None:
            in_l, in_ab = (replace(targets.negatives, rows=rows) for rows in targets.negatives.rows.chunk(2, dim=2))
        losses, hard = [], self.hard(step)
        for light, colour in by_view(embeddings):
            losses.append(info_nce(light, colour, self.queue_ab.keys, self.temperature, in_ab, hard))
            losses.append(info_nce(colour, light, self.queue_l.keys, self.temperature, in_l, hard))
        return torch.stack(losses).mean()

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return the pairs of L against ab and of ab against L, for each view."""
        pairs = []
        for both, (light, colour) in zip(features, by_view(embeddings), strict=True):
            of_l, of_ab = both.chunk(2, dim=1)
            pairs.append(Pair(light, colour, of_ab, self.projector_ab, self.queue_ab.keys))
            pairs.append(Pair(colour, light, of_l, self.projector_l, self.queue_l.keys))
        return pairs

    def non_semantic(self, targets: Targets, pairs: Sequence[Pair]) -> list[Tensor]:
        """Return negatives in the other colour space: in ab for anchors of L, and in L for anchors of ab."""
        if targets.negatives is None:
            return []
        in_l, in_ab = targets.negatives.rows.chunk(2, dim=2)
        return [in_ab, in_l] * (len(pairs) // 2)

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Add the batch to both queues."""
        for light, colour in by_view(embeddings):
            self.queue_l.push(light)
            self.queue_ab.push(colour)


def by_view(embeddings: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return (L, ab) of each view, from the result of `project`."""
    views = len(embeddings) // 2
    return list(zip(embeddings[:views], embeddings[views:], strict=True))
