"""The contract of a contrastive method: a few verbs, most of which have a default."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from icl_msr.core.views import NonSemantic, Views
from icl_msr.models.backbones import Backbone
from icl_msr.models.batchnorm import frozen_statistics
from icl_msr.models.momentum import MomentumEncoder, Queue


@dataclass(frozen=True)
class Step:
    """Where training stands, counted in optimiser steps."""

    index: int
    total: int
    noise: int = 0
    """Seed of all randomness inside a method (dropout, stochastic depth, random features) for this micro-batch, so that
    a pass can be repeated."""
    epochs: float = 1
    """What `total` is in epochs."""
    logs: bool = False
    """Whether the numbers of this step are written. Costly ones are computed only then."""

    @property
    def progress(self) -> float:
        """From 0 at the first step to 1 at the end."""
        return min(self.index / max(self.total, 1), 1.0)

    @property
    def epoch(self) -> float:
        """Epochs done, with fractions."""
        return self.progress * self.epochs


@dataclass
class Targets:
    """What a batch is compared with. No gradient flows into it; it is computed once a batch and reused at theta'."""

    features: list[Tensor] = field(default_factory=list)
    """The momentum encoder's pooled features (N, c), one entry a view; empty without a momentum encoder."""
    embeddings: list[Tensor] = field(default_factory=list)
    """Their projections (N, D)."""
    negatives: NonSemantic | None = None
    """Embeddings (N, m, D) of the non-semantic negatives."""
    labels: Tensor | None = None
    """(N,) classes, for a method that is supervised."""


@dataclass
class Pair:
    """One direction of comparison: the anchors of one view against the keys of another.

    It says all that a regularizer or a monitor needs to know of a method.
    """

    anchor: Tensor
    """(N, D) what the method compares: a projection or a prediction."""
    key: Tensor
    """(N, D) what it is compared with, `head(key_features)`."""
    key_features: Tensor
    """(N, c) pooled features of the other view, online or momentum as in the method."""
    head: nn.Module
    """(., c) to (., D); a frozen one still passes the gradient to its input."""
    bank: Tensor | None = None
    """(K, D) the method's own negatives; None: the other rows of `key`, on all ranks."""


@dataclass
class Output:
    """What one forward pass gives."""

    loss: Tensor
    """() L_ct, the method's whole loss, non-semantic negatives included."""
    features: list[Tensor]
    """Pooled features (N, c) of each view, with gradient."""
    pairs: list[Pair]
    embeddings: list[Tensor] = field(default_factory=list)
    """What `project` gave, with gradient."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Numbers () by name. They are averaged over ranks and reach every logger and the report's curves."""


class Method(nn.Module, ABC):
    """A contrastive method.

    A subclass has a constructor, a `loss`, and those other verbs that differ from their defaults. By default the
    projector takes all views in one batch, and the two global views are compared with each other: with what
    `momentum_encoder` makes of them where there is one, and against the keys in `queue` where there is one. A subclass
    sets these two after calling `super().__init__`.

    `targets`, `encode`, `project`, `loss` and `pairs` are functions of parameters, buffers and inputs. `forward`
    composes them, so `torch.func.functional_call` evaluates the very same training loss at other parameters. State
    moves in `observe` (every micro-batch, after the backward pass) and in `advance` (every optimiser step) alone.

    Args:
        backbone: the encoder that is trained.
        projector: (., c) to (., D); None: embeddings are the features.
    """

    backbone: Backbone
    temperature: float | None = None
    takes: tuple[int, int] = (2, 2)
    """Fewest and most views of an image; with more than two, the first two are the global ones."""
    online_views = slice(None)
    """Views that the backbone encodes."""
    target_views = slice(2)
    """Views that the momentum encoder encodes."""
    refuses: Mapping[str, str] = {}
    """Why a config group, `regularizer` or `negatives`, has no meaning here, and what to do instead."""

    def __init__(self, backbone: Backbone, projector: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.projector: nn.Module = nn.Identity() if projector is None else projector
        self.momentum_encoder: MomentumEncoder | None = None
        self.queue: Queue | None = None

    @property
    def channels(self) -> int:
        """c, the width of `Pair.key_features`."""
        return self.backbone.channels

    # ------------------------------------------------------------------------------------------ functions

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Return the side of the comparison that has no gradient: the momentum encoder's, and embedded negatives."""
        targets = Targets()
        if self.momentum_encoder is not None:
            targets.features = encode_views(self.momentum_encoder.backbone, views.views[self.target_views])
            targets.embeddings = in_one_batch(self.momentum_encoder.projector, targets.features)
        if views.negatives is not None:
            images = views.negatives.rows
            with frozen_statistics(self):  # the encoder is evaluated later, and its statistics never see a texture
                rows = self.embed(images.flatten(0, 1))
            targets.negatives = replace(views.negatives, rows=rows.reshape(*images.shape[:2], -1))
        return targets

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of non-semantic negatives, through the momentum encoder where there is one."""
        encoder = self.momentum_encoder
        embeddings: Tensor = self.projector(self.backbone(images)) if encoder is None else encoder(images)
        return embeddings

    def encode(self, views: Views) -> list[Tensor]:
        """Return pooled features (N, c) of each view. The trained backbone runs nowhere else, once for each size."""
        return encode_views(self.backbone, views.views[self.online_views])

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return what is compared, (N, c) to (N, D) for each view: projections, or predictions."""
        return in_one_batch(self.projector, features)

    @abstractmethod
    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return () L_ct. It reads buffers and writes none."""

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return which anchors are compared with which keys: by default, each global view's with the other's."""
        keys, key_features, head = embeddings[:2], features[:2], self.projector
        if self.momentum_encoder is not None:
            keys, key_features, head = targets.embeddings, targets.features, self.momentum_encoder.projector
        return crosswise(embeddings, keys, key_features, head, None if self.queue is None else self.queue.keys)

    def non_semantic(self, targets: Targets, pairs: Sequence[Pair]) -> list[Tensor]:
        """Return the non-semantic negatives (N, m, D) that meet the anchors of each pair; none where there are none."""
        return [] if targets.negatives is None else [targets.negatives.rows] * len(pairs)

    def log(self, output: Output, targets: Targets) -> dict[str, Tensor]:
        """Return numbers () of one's own for the log, by name. Only steps that are logged ask, without gradient."""
        return {}

    def forward(self, views: Views, targets: Targets, step: Step) -> Output:
        """Return L_ct of a batch and all that it is made of."""
        features = self.encode(views)
        embeddings = self.project(features)
        loss = self.loss(embeddings, targets, step)
        output = Output(loss, features, self.pairs(features, embeddings, targets), embeddings)
        if step.logs:
            with torch.no_grad():
                output.log |= self.log(output, targets)
        return output

    def require_batch(self, images: int) -> None:
        """Check that a step has enough images, on all ranks together.

        Raises:
            UserError: they are too few for this method.
        """

    # ------------------------------------------------------------------------------------------ state

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Take a batch into queues and banks: its targets, or what `project` gave, detached.

        It comes after the loss, so that a key is never among its own negatives.
        """
        if self.queue is not None:
            self.queue.push(targets.embeddings[0])

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """Return the parameters that this optimiser step leaves alone."""
        return ()

    def advance(self, step: Step) -> None:
        """Let the momentum encoder follow."""
        if self.momentum_encoder is not None:
            self.momentum_encoder.follow(self.backbone, self.projector, step.progress)


def encode_views(backbone: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Return features (N, c) of each view (N, C, h, w), neighbours of one size in one pass."""
    features: list[Tensor] = []
    for _, same in itertools.groupby(views, lambda view: view.shape[-1]):
        features += in_one_batch(backbone, list(same))
    return features


def in_one_batch(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """Put V tensors (N, ...) through a network in one batch of V N rows, and return V results (N, ...)."""
    batch = views[0] if len(views) == 1 else torch.cat(list(views))
    return list(network(batch).chunk(len(views)))


def crosswise(
    anchors: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_features: Sequence[Tensor],
    head: nn.Module,
    bank: Tensor | None = None,
) -> list[Pair]:
    """Pair the anchors of each global view with the keys of the other. See `Pair` for the arguments.

    Two keys are those of the two global views, and anchors of local views have none. One key is the other view's.
    """
    sides = zip(anchors, reversed(keys), reversed(key_features), strict=False)
    return [Pair(anchor, key, features, head, bank) for anchor, key, features in sides]
