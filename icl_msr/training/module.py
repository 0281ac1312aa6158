"""One thin LightningModule: a method, an optional regularizer, an optimiser. Views arrive ready from the DataModule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from icl_msr.core.distributed import average, gather, rank, world_size
from icl_msr.core.randomness import keys
from icl_msr.core.views import Views
from icl_msr.losses.contrastive import CHUNK, own_rows, unit
from icl_msr.methods.base import Method, Output, Pair, Step, Targets, frozen_statistics
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.regularizers.bilevel import ordinary_gradient
from icl_msr.training.datamodule import DataModule
from icl_msr.training.optimization import Optimization, follow, steps_per_epoch


@dataclass
class Batch:
    """What a micro-batch leaves for the hooks that follow its backward pass."""

    views: Views
    targets: Targets
    output: Output
    step: Step


class Pretraining(pl.LightningModule):
    """Wraps a method with the optional regularizer.

    Automatic optimisation stays, so clipping, accumulation, precision and DDP are Lightning's. The encoder's step is
    the only one that ticks `global_step`; the regularizer steps f_msr just before it, where the ordinary gradient is
    complete, unscaled and not yet clipped.
    """

    def __init__(
        self,
        method: Method,
        regularizer: MetaSemanticRegularizer | None,
        optimization: Optimization,
        *,
        seed: int,
        batch_size: int,
    ):
        super().__init__()
        self.method = method
        self.regularizer = regularizer
        self.optimization = optimization
        self.seed, self.batch_size = seed, batch_size
        self.batch: Batch | None = None
        # f_msr's gradient is reduced by the regularizer itself.
        phi = [name for name, _ in self.named_parameters() if name.startswith("regularizer.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, phi)  # type: ignore[no-untyped-call]

    def configure_callbacks(self) -> list[pl.Callback]:
        """See `Observe`."""
        return [Observe()]

    def configure_optimizers(self) -> Any:
        """The encoder's optimiser; f_msr has its own, inside the regularizer."""
        trainer = self.trainer
        total = int(trainer.estimated_stepping_batches)
        global_batch = self.batch_size * trainer.accumulate_grad_batches
        optimizer, schedule = self.optimization.build(self.method, global_batch, total, steps_per_epoch(trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """The learning rate is a function of the step, also where a resumed run has more epochs than before."""
        schedule: Any = self.lr_schedulers()
        follow(schedule)

    def training_step(self, views: Views, batch_index: int) -> Tensor:
        """L_to = L_ct + lambda L_msr with f_msr held fixed."""
        step = self.step(batch_index)
        views = at(views, step)
        targets = self.method.targets(views)
        torch.manual_seed(step.noise)
        output: Output = self.method(views, targets, step)
        self.batch = Batch(views, targets, output, step)
        loss = output.loss
        log = {"loss/contrastive": output.loss.detach()}
        if self.regularizer is not None:
            penalty = self.regularizer(views.images, output.pairs)
            loss = loss + self.regularizer.lam * penalty
            log["loss/msr"] = penalty.detach()
        if self.logs():
            log = {"loss": loss.detach(), **log}
            if self.regularizer is not None:
                found = self.regularizer.diagnostics(views.images, output.pairs)
                log |= {f"msr/{name}": value for name, value in found.items()}
            if targets.negatives is not None:
                cosines = similarities(output.pairs, self.method.non_semantic(targets, output.pairs))
                log |= {f"negatives/similarity_{name}": value for name, value in cosines.items()}
            over_ranks = dict(zip(log, average(list(log.values())), strict=True))
            self.log_dict({**over_ranks, **health(output), "lr": self.learning_rate()})
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Frozen parameters lose their gradient; then f_msr's step, with the ordinary gradient as its inner one."""
        batch, regularizer = self.batch, self.regularizer
        for parameter in self.method.frozen(self.step(0)):
            parameter.grad = None
        if batch is None or regularizer is None or not regularizer.due(batch.step):
            return
        inner = ordinary_gradient(self.method)
        features = batch.output.features if self.trainer.precision == "32-true" else None
        arguments = (self.method, batch.views, batch.targets, batch.step, inner, self.learning_rate())
        log = regularizer.meta_step(*arguments, features, self.autocast())
        self.log_dict({f"msr/{name}": value for name, value in log.items()})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Once an optimiser step, the momentum encoders follow."""
        super().optimizer_step(*args, **kwargs)
        self.method.advance(self.step(0))

    def on_train_epoch_end(self) -> None:
        """Algorithm 1: a second pass over the epoch's batches that moves f_msr and nothing else."""
        regularizer = self.regularizer
        if regularizer is None or regularizer.optimizer is None or regularizer.schedule != "per_epoch":
            return
        data: DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        log: dict[str, Tensor] = {}
        epoch = data.epoch(self.current_epoch, self.device, int(self.trainer.num_training_batches))
        for index, views in enumerate(epoch):
            step = self.step(index)
            views = at(views, step)
            with torch.no_grad(), frozen_statistics(self.method):
                targets = self.method.targets(views)
            arguments = (self.method, views, targets, step, None, self.learning_rate())
            log = regularizer.meta_step(*arguments, precision=self.autocast())
        self.log_dict({f"msr/{name}": value for name, value in log.items()})

    def step(self, batch_index: int) -> Step:
        """Where training stands; the noise of a micro-batch depends on the seed and on its place alone."""
        place = torch.tensor([self.current_epoch << 32 | (batch_index * world_size() + rank())])
        noise = int(keys(self.seed, self.global_step, place, view=-2))
        total = int(self.trainer.estimated_stepping_batches)
        return Step(self.global_step, total, noise, total / steps_per_epoch(self.trainer))

    def learning_rate(self) -> float:
        """The learning rate that theta's next step uses."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        return float(optimizer.param_groups[0]["lr"])

    def autocast(self) -> torch.dtype | None:
        """What a gradient beside the ordinary one is computed in; fp16's would need a scale of its own."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None

    def logs(self) -> bool:
        """Logging costs more than a small step, so values are computed only when they are written."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.global_step + 1) % every == 0


class Observe(pl.Callback):
    """After every micro-batch's backward pass, queues take it in.

    A callback, because Lightning calls callbacks before the module's own hook, and those that write a checkpoint last.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `Method.observe`."""
        assert isinstance(pl_module, Pretraining)
        batch_done = pl_module.batch
        assert batch_done is not None
        embeddings = [embedding.detach() for embedding in batch_done.output.embeddings]
        pl_module.method.observe(batch_done.targets, embeddings)


def at(views: Views, step: Step) -> Views:
    """Views whose negatives have the alpha of this step."""
    return views if views.negatives is None else replace(views, negatives=views.negatives.at(step.progress))


def health(output: Output) -> dict[str, Tensor]:
    """Collapse monitor: std of unit embeddings x sqrt(D), 1 when they fill the sphere and 0 when they collapse."""
    embeddings = unit(gather(output.embeddings[0].detach()))
    return {"embedding_std": embeddings.std(dim=0).mean() * embeddings.shape[1] ** 0.5}


HARDEST = 100
"""One in so many of the others is among the hardest."""


@torch.no_grad()
def similarities(pairs: Sequence[Pair], own: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean cosine of an anchor to what it is compared with: are non-semantic negatives the hard ones (Ge et al. 2021)?

    `own`: to its own non-semantic negatives, (N, m, D) for each pair; `positive`: to its key; `others`: to the bank,
    or to the other images' keys on all ranks; `hardest`: to the hundredth of these that is most like it. Of as many
    anchors as the similarities of which fit in a chunk.
    """
    found: dict[str, list[Tensor]] = {"own": [], "positive": [], "others": [], "hardest": []}
    for pair, negatives in zip(pairs, own, strict=True):
        bank = gather(unit(pair.key)) if pair.bank is None else unit(pair.bank)
        looked_at = slice(max(1, CHUNK // len(bank)))
        anchor = unit(pair.anchor[looked_at])
        with torch.autocast(anchor.device.type, enabled=False):
            others = anchor @ bank.T
        if pair.bank is None:
            itself = own_rows(len(pair.anchor), anchor.device)[looked_at]
            kept = torch.ones_like(others, dtype=torch.bool).scatter_(1, itself, False)
            others = others[kept].view(len(anchor), -1)
        found["own"].append((anchor[:, None] * unit(negatives[looked_at])).sum(2))
        found["positive"].append((anchor * unit(pair.key[looked_at])).sum(1))
        found["others"].append(others)
        found["hardest"].append(others.topk(-(-others.shape[1] // HARDEST), dim=1).values)
    return {name: torch.stack([cosines.mean() for cosines in values]).mean() for name, values in found.items()}
