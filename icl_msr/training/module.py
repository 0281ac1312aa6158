"""The LightningModule of pre-training: a method, an optional regularizer and an optimiser."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from icl_msr.core.distributed import average, rank, world_size
from icl_msr.core.errors import UserError
from icl_msr.core.randomness import keys
from icl_msr.core.views import Views
from icl_msr.methods.base import Method, Step
from icl_msr.models.batchnorm import frozen_statistics
from icl_msr.models.momentum import Queue
from icl_msr.regularizers.base import Pass, Regularizer
from icl_msr.training.datamodule import DataModule
from icl_msr.training.monitors import collapse, similarities
from icl_msr.training.optimization import Optimization, follow, steps_per_epoch


class Pretraining(pl.LightningModule):
    """Trains a method, with or without a regularizer, in any Trainer. The DataModule yields finished views.

    It uses automatic optimisation, so clipping, accumulation, precision and DDP are Lightning's. Only the method's
    optimiser counts in `global_step`. A regularizer updates its own parameters just before the method's step, when the
    method's gradient is complete, unscaled and not yet clipped.

    Args:
        method: the method that is trained.
        regularizer: the regularizer of its loss, or None.
        optimization: builds the method's optimiser and its schedule.
        seed: seed of all randomness inside the method.
        batch_size: images of a micro-batch, on all devices together.
        config: plain data for loggers and checkpoints.
    """

    def __init__(
        self,
        method: Method,
        regularizer: Regularizer | None,
        optimization: Optimization,
        *,
        seed: int,
        batch_size: int,
        config: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.save_hyperparameters("seed", "batch_size", "config")
        self.method = method
        self.regularizer = regularizer
        self.optimization = optimization
        self.seed, self.batch_size = seed, batch_size
        self.latest: Pass | None = None
        """The latest micro-batch."""
        self._unseen = False
        self.measured: dict[str, Any] = {}
        """The regularizer's latest numbers. It may have none in the step that is logged."""
        # A regularizer reduces its own gradients. DDP has no public way to exclude parameters.
        own = [name for name, _ in self.named_parameters() if name.startswith("regularizer.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, own)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------------------------------ optimisation

    @override
    def configure_optimizers(self) -> Any:
        global_batch = self.batch_size * self.trainer.accumulate_grad_batches
        optimizer, schedule = self.optimization.build(self.method, global_batch, *self.length())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_train_start(self) -> None:
        # The learning rate is a function of the step, also in a resumed run with more epochs.
        schedule: Any = self.lr_schedulers()
        follow(schedule)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for parameter in self.method.frozen(self.step()):
            parameter.grad = None
        if self.regularizer is not None and self.latest is not None:
            found = self.regularizer.before_step(self.latest)
            values = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in found.values()]
            self.measured |= dict(zip(found, average(values) if values else [], strict=True))
            if self.logs():
                self.log_dict(dict(self.measured))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["measured"] = {name: float(value) for name, value in self.measured.items()}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.measured = dict(checkpoint.get("measured", {}))

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.method.advance(self.step())
        self._observe()

    # ------------------------------------------------------------------------------------------ batches

    @override
    def training_step(self, views: Views, batch_index: int) -> Tensor:
        step = self.step(batch_index)
        views = at(views, step)
        targets = self.method.targets(views)
        torch.manual_seed(step.noise)
        output = self.method(views, targets, step)
        loss: Tensor = output.loss
        if self.regularizer is not None:
            loss = loss + self.regularizer(views, output, step)
        self.latest = Pass(self.method, views, targets, step, self.learning_rate(), self.autocast(), output)
        self._unseen = True
        if step.logs:
            output.log |= {"loss": loss.detach(), "loss/contrastive": output.loss.detach(), **collapse(output)}
            output.log |= similarities(output.pairs, self.method.non_semantic(targets, output.pairs))
            if views.negatives is not None:
                output.log |= views.negatives.log
            self.log_dict(dict(output.log), sync_dist=True)
            self.log("lr", self.learning_rate())
        return loss

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._observe()  # without an optimiser step, the micro-batch is still unseen

    def _observe(self) -> None:
        """Let the method take in the latest micro-batch, once.

        It comes after the optimiser's step, because the regularizer needs the state that the loss was computed with.
        It comes before callbacks see the end of the batch, because some of them write a checkpoint.
        """
        if self._unseen and self.latest is not None and self.latest.output is not None:
            self._unseen = False
            self.method.observe(self.latest.targets, [e.detach() for e in self.latest.output.embeddings])

    @override
    def on_train_epoch_end(self) -> None:
        if self.regularizer is not None:
            self.log_dict(self.regularizer.after_epoch(self._again()), sync_dist=True)

    def _again(self) -> Iterator[Pass]:
        """Yield the epoch's batches again. The state of the method does not change.

        The queues hold keys of the epoch's last images. Those of a batch's own images are hidden while it is used, so
        that no image is its own negative.

        Raises:
            UserError: the trainer's DataModule is not this package's `DataModule`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise UserError(
                f"{type(self.regularizer).__name__} goes through an epoch a second time, which only "
                "icl_msr.training.datamodule.DataModule can repeat; pass one to trainer.fit as datamodule=..."
            )
        batches = int(self.trainer.num_training_batches)
        queues = [module for module in self.method.modules() if isinstance(module, Queue)]
        for index, views in enumerate(data.epoch(self.current_epoch, self.device, batches)):
            step = self.step(index)
            views = at(views, step)
            images = len(views.index) * world_size()
            with ExitStack() as hidden:
                for queue in queues:
                    hidden.enter_context(queue.without(images, newer=(batches - 1 - index) * images))
                with torch.no_grad(), frozen_statistics(self.method):
                    targets = self.method.targets(views)
                yield Pass(self.method, views, targets, step, self.learning_rate(), self.autocast())

    # ------------------------------------------------------------------------------------------ state of training

    def step(self, batch_index: int = 0) -> Step:
        """Return the state of training. The noise of a micro-batch depends only on the seed and its position."""
        place = torch.tensor([self.current_epoch << 32 | (batch_index * world_size() + rank())])
        noise = int(keys(self.seed, self.global_step, place, view=-2))
        total, epoch = self.length()
        return Step(self.global_step, total, noise, total / epoch, self.logs())

    def length(self) -> tuple[int, int]:
        """Return the number of optimiser steps of the whole training and of an epoch.

        Raises:
            UserError: neither the number of epochs nor the number of steps is limited.
        """
        total = self.trainer.estimated_stepping_batches
        if not 0 <= total < math.inf:
            raise UserError("A schedule needs to know when training ends; give the Trainer max_epochs or max_steps.")
        return int(total), steps_per_epoch(self.trainer)

    def learning_rate(self) -> float:
        """Return the learning rate of the method's next step."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return float(optimizer.param_groups[0]["lr"])

    def autocast(self) -> torch.dtype | None:
        """Return the dtype of autocast in a training step; None where there is no autocast."""
        device = self.device.type
        with self.trainer.precision_plugin.forward_context():
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def logs(self) -> bool:
        """Return whether the numbers of this step are logged. Computing them can take longer than a small step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.global_step + 1) % every == 0


def at(views: Views, step: Step) -> Views:
    """Return the views with the alpha of this step in their negatives."""
    return views if views.negatives is None else replace(views, negatives=views.negatives.at(step.progress))
