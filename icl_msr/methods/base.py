"""The contract of a contrastive method: a few verbs, most of them inherited as nothing."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from icl_msr.core.views import NonSemantic, Views
from icl_msr.models.backbones import Backbone


@dataclass(frozen=True)
class Step:
    """Where training stands, counted in optimiser steps."""

    index: int
    total: int
    noise: int = 0
    """Seed of all randomness inside a method (dropout, stochastic depth, random features) for this micro-batch, so that
    it can be replayed."""
    epochs: float = 1
    """What `total` is in epochs."""

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
    """What a batch is compared with and no gradient flows into; computed once a batch, reused at theta'."""

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


class Method(nn.Module, ABC):
    """A contrastive method.

    `targets`, `encode`, `project`, `loss` and `pairs` are functions of parameters, buffers and inputs. `forward`
    composes them, so `torch.func.functional_call` evaluates the very same training loss at other parameters. State
    moves in `observe` (every micro-batch, after the backward pass) and in `advance` (every optimiser step) alone.
    """

    backbone: Backbone
    temperature: float | None = None
    takes: tuple[int, int] = (2, 2)
    """Fewest and most views of an image; with more than two, the first two are the global ones."""
    refuses: Mapping[str, str] = {}
    """Why a config group, `regularizer` or `negatives`, has no meaning here, and what to do instead."""

    @property
    def channels(self) -> int:
        """c, the width of `Pair.key_features`."""
        return self.backbone.channels

    def targets(self, views: Views) -> Targets:
        """No-gradient side of the comparison."""
        return Targets()

    def encode(self, views: Views) -> list[Tensor]:
        """Pooled features (N, c) per view: the only place where the trained backbone runs, once for each size."""
        return encode_views(self.backbone, views.views)

    @abstractmethod
    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Projector, and predictor if any: (N, c) per view to (N, D) per view."""

    @abstractmethod
    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """L_ct: reads buffers and writes none."""

    @abstractmethod
    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Which anchors are compared with which keys."""

    def non_semantic(self, targets: Targets, pairs: Sequence[Pair]) -> list[Tensor]:
        """The non-semantic negatives (N, m, D) that meet the anchors of each pair; none where there are none."""
        return [] if targets.negatives is None else [targets.negatives.rows] * len(pairs)

    def forward(self, views: Views, targets: Targets, step: Step) -> Output:
        """L_ct of a batch."""
        features = self.encode(views)
        embeddings = self.project(features)
        loss = self.loss(embeddings, targets, step)
        return Output(loss, features, self.pairs(features, embeddings, targets), embeddings)

    def require_batch(self, images: int) -> None:
        """Whether the images of a step, on all ranks together, are enough.

        Raises:
            UserError: they are too few for this method.
        """

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Queues and banks take the batch in: its targets, or what `project` gave, detached."""

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """Parameters that this optimiser step leaves alone."""
        return ()

    def advance(self, step: Step) -> None:
        """Momentum encoders follow."""


def encode_views(backbone: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Features (N, c) of each view (N, C, h, w), neighbours of one size in one pass."""
    features: list[Tensor] = []
    for _, same in itertools.groupby(views, lambda view: view.shape[-1]):
        group = list(same)
        features += backbone(torch.cat(group)).chunk(len(group))
    return features


@torch.no_grad()
def embed_negatives(
    negatives: NonSemantic | None, embed: Callable[[Tensor], Tensor], owner: nn.Module
) -> NonSemantic | None:
    """Embeds non-semantic negatives without gradient, with batch statistics of their own.

    The running statistics of `owner`, whose encoder is evaluated later, never see a texture.
    """
    if negatives is None:
        return None
    with frozen_statistics(owner):
        rows = embed(negatives.rows.flatten(0, 1))
    return replace(negatives, rows=rows.reshape(*negatives.rows.shape[:2], -1))


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm layers inside `module` go on normalising as they do, and leave their running statistics alone."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
