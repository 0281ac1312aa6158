"""The contract of a contrastive method: a few functions, most of which have a default."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from icl_msr.core.views import NonSemantic, Views
from icl_msr.losses.contrastive import HardSum
from icl_msr.losses.hard_negatives import HardNegatives
from icl_msr.models.backbones import Backbone
from icl_msr.models.batchnorm import frozen_statistics
from icl_msr.models.momentum import MomentumEncoder, Queue


@dataclass(frozen=True)
class Step:
    """The state of training, counted in optimiser steps."""

    index: int
    total: int
    noise: int = 0
    """Seed of all randomness inside a method (dropout, stochastic depth, random features) for this micro-batch. The
    same seed repeats a pass."""
    epochs: float = 1
    """`total` in epochs."""
    logs: bool = False
    """True if the numbers of this step are written. Costly numbers are computed only then."""

    @property
    def progress(self) -> float:
        """Finished share of training, from 0 at the first step to 1 at the end."""
        return min(self.index / max(self.total, 1), 1.0)

    @property
    def epoch(self) -> float:
        """Finished epochs, with fractions."""
        return self.progress * self.epochs


@dataclass
class Targets:
    """The side of a comparison that has no gradient. It is computed once per batch and reused at theta'."""

    features: list[Tensor] = field(default_factory=list)
    """The momentum encoder's pooled features (N, c), one entry per view; empty without a momentum encoder."""
    embeddings: list[Tensor] = field(default_factory=list)
    """Projections (N, D) of `features`."""
    negatives: NonSemantic | None = None
    """Embeddings (N, m, D) of the non-semantic negatives."""
    labels: Tensor | None = None
    """Classes (N,) int64, for supervised training; -1: unlabelled."""


@dataclass
class Pair:
    """One direction of comparison: the anchors of one view against the keys of another.

    A regularizer or a monitor needs to know no more about a method.
    """

    anchor: Tensor
    """Projections or predictions (N, D) of one view."""
    key: Tensor
    """Embeddings (N, D) that the anchors are compared with, `head(key_features)`."""
    key_features: Tensor
    """Pooled features (N, c) of the other view, from the online or the momentum encoder, as in the method."""
    head: nn.Module
    """Network from (., c) to (., D). A frozen head still passes the gradient to its input."""
    bank: Tensor | None = None
    """The method's own negatives (K, D). None: the other rows of `key`, on all ranks."""


@dataclass
class Output:
    """The result of one forward pass."""

    loss: Tensor
    """L_ct (), the method's whole loss, including non-semantic negatives."""
    features: list[Tensor]
    """Pooled features (N, c) of each view, with gradient."""
    pairs: list[Pair]
    embeddings: list[Tensor] = field(default_factory=list)
    """The result of `Method.project`, with gradient."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Numbers () by name. They are averaged over ranks and go to every logger and to the report's curves."""


class Method(nn.Module, ABC):
    """A contrastive method.

    A subclass has a constructor and a `loss`, and overrides other functions only if it differs from their defaults. By
    default the projector takes all views in one batch, and the two global views are compared with each other. If
    `momentum_encoder` is set, the views are compared with its embeddings. If `queue` is set, its keys are the
    negatives. A subclass sets these two after calling `super().__init__`.

    `targets`, `encode`, `project`, `loss` and `pairs` are functions of parameters, buffers and inputs. `forward`
    composes them, so `torch.func.functional_call` evaluates the same training loss at other parameters. State changes
    only in `observe` (every micro-batch, after the backward pass) and in `advance` (every optimiser step).

    Args:
        backbone: the encoder that is trained.
        projector: network from (., c) to (., D). None: embeddings are the features.
    """

    backbone: Backbone
    temperature: float | None = None
    takes: tuple[int, int] = (2, 2)
    """Smallest and largest number of views of an image. Of more than two views, the first two are the global ones."""
    online_views = slice(None)
    """Views that the backbone encodes."""
    target_views = slice(2)
    """Views that the momentum encoder encodes."""
    apart = False
    """True if each view is a batch of its own, with its own statistics in BatchNorm. By default, all views are one."""
    own_statistics = False
    """True if the backbone's BatchNorm normalises the images of each rank by themselves, not those of all ranks."""
    refuses: Mapping[str, str] = {
        "hard_negatives": "this method has no sum over negatives that could be made harder; add hard_negatives=none, "
        "or choose a method that has one, such as simclr or moco.",
    }
    """Config groups (`regularizer`, `negatives`, `hard_negatives`) that this method cannot use, each with the reason
    and the remedy. `synthetic` refuses those hard negatives that are made from others. A method whose loss uses `hard`
    refuses no hard negatives."""

    def __init__(self, backbone: Backbone, projector: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.projector: nn.Module = nn.Identity() if projector is None else projector
        self.momentum_encoder: MomentumEncoder | None = None
        self.queue: Queue | None = None
        self.hard_negatives: HardNegatives | None = None
        """What the loss does with its negatives, chosen for the run."""

    @property
    def channels(self) -> int:
        """Number of channels c of `Pair.key_features`."""
        return self.backbone.channels

    # ------------------------------------------------------------------------------------------ functions

    @torch.no_grad()
    def targets(self, views: Views) -> Targets:
        """Return the side of the comparison that has no gradient: momentum embeddings and embedded negatives."""
        targets = Targets()
        if self.momentum_encoder is not None:
            targets.features = encode_views(self.momentum_encoder.backbone, views.views[self.target_views], self.apart)
            targets.embeddings = through(self.momentum_encoder.projector, targets.features, self.apart)
        if views.negatives is not None:
            with frozen_statistics(self):  # the encoder is evaluated later, and its statistics never see a texture
                rows = torch.stack([self.embed(images) for images in views.negatives.rows.unbind(1)], dim=1)
            targets.negatives = replace(views.negatives, rows=rows)
        return targets

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of non-semantic negatives, from the momentum encoder if there is one."""
        encoder = self.momentum_encoder
        embeddings: Tensor = self.projector(self.backbone(images)) if encoder is None else encoder(images)
        return embeddings

    def encode(self, views: Views) -> list[Tensor]:
        """Return pooled features (N, c) of each view.

        The trained backbone runs nowhere else. It runs once for each image size.
        """
        return encode_views(self.backbone, views.views[self.online_views], self.apart)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the projections or predictions of each view: (N, c) to (N, D)."""
        return through(self.projector, features, self.apart)

    @abstractmethod
    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return L_ct (). The loss may read buffers and must not write any."""

    def hard(self, step: Step) -> HardSum | None:
        """Return the sum over the negatives at this step, for the losses of `icl_msr.losses.contrastive`."""
        return None if self.hard_negatives is None else self.hard_negatives.at(step.index, step.epoch)

    def pairs(self, features: Sequence[Tensor], embeddings: Sequence[Tensor], targets: Targets) -> list[Pair]:
        """Return the compared pairs of anchors and keys. By default, each global view is compared with the other."""
        keys, key_features, head = embeddings[:2], features[:2], self.projector
        if self.momentum_encoder is not None:
            keys, key_features, head = targets.embeddings, targets.features, self.momentum_encoder.projector
        return crosswise(embeddings, keys, key_features, head, None if self.queue is None else self.queue.keys)

    def non_semantic(self, targets: Targets, pairs: Sequence[Pair]) -> list[Tensor]:
        """Return the non-semantic negatives (N, m, D) of each pair's anchors; an empty list if there are none."""
        return [] if targets.negatives is None else [targets.negatives.rows] * len(pairs)

    def log(self, output: Output, targets: Targets) -> dict[str, Tensor]:
        """Return further numbers () for the log, by name. Only logged steps call it, without gradient."""
        return {}

    def forward(self, views: Views, targets: Targets, step: Step) -> Output:
        """Return L_ct of a batch, with the features, embeddings and pairs that it was computed from."""
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
            UserError: the images are too few for this method.
        """

    # ------------------------------------------------------------------------------------------ state

    def observe(self, targets: Targets, embeddings: Sequence[Tensor]) -> None:
        """Add a batch to queues and banks: its targets, or the detached result of `project`.

        It is called after the loss, so that a key is never among its own negatives.
        """
        if self.queue is not None:
            self.queue.push(targets.embeddings[0])

    def frozen(self, step: Step) -> Iterable[nn.Parameter]:
        """Return the parameters that this optimiser step does not change."""
        return ()

    def advance(self, step: Step) -> None:
        """Update the momentum encoder after an optimiser step."""
        if self.momentum_encoder is not None:
            self.momentum_encoder.follow(self.backbone, self.projector, step.progress)


def encode_views(backbone: nn.Module, views: Sequence[Tensor], apart: bool = False) -> list[Tensor]:
    """Return features (N, c) of each view (N, C, h, w). Neighbouring views of one size are encoded in one pass.

    `apart` encodes each view in a pass of its own.
    """
    features: list[Tensor] = []
    for _, same in itertools.groupby(views, lambda view: view.shape[-1]):
        features += through(backbone, list(same), apart)
    return features


def through(network: Callable[[Tensor], Tensor], views: Sequence[Tensor], apart: bool = False) -> list[Tensor]:
    """Put V tensors (N, ...) through a network and return V results (N, ...).

    They are one batch of V N rows, or V batches if they are to stay `apart`.
    """
    if apart:
        return [network(view) for view in views]
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

    Two keys belong to the two global views; anchors of local views are then not paired. A single key belongs to the
    second view, so only the first view is paired.
    """
    sides = zip(anchors, reversed(keys), reversed(key_features), strict=False)
    return [Pair(anchor, key, features, head, bank) for anchor, key, features in sides]
