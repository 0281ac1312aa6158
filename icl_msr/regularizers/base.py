"""The contract of a regularizer: a second loss for any method, and what it may do beside it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icl_msr.core.views import Views
from icl_msr.methods.base import Method, Output, Step, Targets


@dataclass(frozen=True)
class Pass:
    """A micro-batch in training: all that a step of a regularizer's own may be computed from."""

    method: Method
    views: Views
    targets: Targets
    step: Step
    learning_rate: float
    """The method's, at this step."""
    precision: torch.dtype | None = None
    """Autocast's in the ordinary forward pass; None: there is no autocast."""
    output: Output | None = None
    """What the ordinary forward pass gave; None in `after_epoch`, which has none."""


class Regularizer(nn.Module, ABC):
    """A second loss for any contrastive method.

    It sees what every method gives and must not know which method that is. `forward` is all that it must have. Its
    parameters are its own: they travel in the checkpoint, but the method's optimiser and DDP leave them alone.
    """

    @abstractmethod
    def forward(self, views: Views, output: Output, step: Step) -> Tensor:
        """Return () what is added to the method's loss, weight included. Numbers for the log go into `output.log`."""

    def before_step(self, batch: Pass) -> dict[str, Tensor]:
        """Move parameters of its own just before a step of the method's optimiser; return numbers for the log.

        The method's gradient lies in `.grad`: complete, the same on all ranks, and not yet clipped.
        """
        return {}

    def after_epoch(self, batches: Iterable[Pass]) -> dict[str, Tensor]:
        """Move parameters of its own after an epoch; return numbers for the log.

        `batches` are those of the epoch, in its order. They are loaded once more, if they are iterated over.
        """
        return {}
