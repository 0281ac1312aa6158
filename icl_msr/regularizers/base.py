"""The contract of a regularizer: a second loss for any method, and optional steps of its own parameters."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icl_msr.core.views import Views
from icl_msr.methods.base import Method, Output, Step, Targets


@dataclass(frozen=True)
class Pass:
    """A micro-batch in training, with everything that a regularizer's own step may use."""

    method: Method
    views: Views
    targets: Targets
    step: Step
    learning_rate: float
    """The method's learning rate at this step."""
    precision: torch.dtype | None = None
    """Autocast's dtype in the ordinary forward pass; None: there is no autocast."""
    output: Output | None = None
    """The result of the ordinary forward pass; None in `after_epoch`, where there is none."""


class Regularizer(nn.Module, ABC):
    """A second loss for any contrastive method.

    It uses only the contract of methods and must not know which method it is given. A subclass needs only `forward`.
    Its parameters are its own: they are saved in the checkpoint, but the method's optimiser and DDP do not touch them.
    """

    @abstractmethod
    def forward(self, views: Views, output: Output, step: Step) -> Tensor:
        """Return the loss () that is added to the method's loss, weight included.

        Numbers for the log are put into `output.log`.
        """

    def before_step(self, batch: Pass) -> dict[str, Tensor]:
        """Update the regularizer's own parameters just before a step of the method's optimiser.

        The method's gradient is in `.grad`. It is complete, the same on all ranks, and not yet clipped.

        Returns:
            Numbers () for the log, by name.
        """
        return {}

    def after_epoch(self, batches: Iterable[Pass]) -> dict[str, Tensor]:
        """Update the regularizer's own parameters after an epoch.

        Args:
            batches: the batches of the epoch, in its order. They are loaded again when they are iterated over.

        Returns:
            Numbers () for the log, by name.
        """
        return {}
