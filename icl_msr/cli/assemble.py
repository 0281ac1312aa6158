"""Build and check everything that a run is made of, before anything is written."""

import copy
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.strategies import DDPStrategy, Strategy

from icl_msr.core.config import Settings, build, suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.suite import Evaluation
from icl_msr.methods import Method
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.models.momentum import Queue
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.training.checkpoint import AtomicCheckpoint
from icl_msr.training.checkpoints import Checkpoints
from icl_msr.training.datamodule import DataModule
from icl_msr.training.hardware import Plan
from icl_msr.training.module import Pretraining
from icl_msr.training.online import OnlineEvaluation
from icl_msr.training.optimization import Optimization
from icl_msr.training.progress import EpochLines, Throughput

Built = TypeVar("Built")

ONLINE = ("online/knn", "online/probe")
LOGGED = ("loss", "loss/contrastive", *ONLINE)
"""Logged values that a sweeper may maximise."""


@dataclass
class Pieces:
    """All that a run is made of, built and checked."""

    dataset: Dataset
    untrained: torch.nn.Module
    module: Pretraining
    data: DataModule
    evaluation: Evaluation | None
    derived: dict[str, float]


def assemble(settings: Settings, plan: Plan) -> Pieces:
    """Builds everything; whatever can be refused is refused here, before anything is written."""
    pl.seed_everything(settings.seed, verbose=False)
    dataset = build_as(Dataset, settings.dataset)
    backbone = build(settings.backbone, dataset.image_size)
    facts = (len(dataset.classes), dataset.mean, dataset.std)
    method = build_as(Method, settings.method, backbone, *facts)  # type: ignore[type-abstract]
    require_meaning(settings, method, plan.world_size)
    untrained = copy.deepcopy(method.backbone)
    regularizer: MetaSemanticRegularizer | None = build(settings.regularizer, method.channels, method.temperature)
    if plan.world_size > 1:
        global_batch_norm(method)
    optimization = build_as(Optimization, settings.optimizer)
    module = Pretraining(method, regularizer, optimization, seed=settings.seed, batch_size=settings.loader.batch_size)
    if plan.channels_last:
        module.to(memory_format=torch.channels_last)
    data = DataModule(
        dataset,
        build(settings.augment),
        build(settings.negatives),
        seed=settings.seed,
        channels_last=plan.channels_last,
        **settings.loader.model_dump(),
    )
    evaluation: Evaluation | None = build(settings.evaluation)
    watched = settings.trainer.online_every_n_epochs and dataset.evaluated.classified
    unlogged = () if watched and dataset.labelled is None else ("online/probe",) if watched else ONLINE
    logged = [name for name in LOGGED if name not in unlogged]
    known = ["auto", *logged, *(evaluation.names(dataset.evaluated) if evaluation else [])]
    if isinstance(evaluation, Evaluation):
        evaluation.require(method.backbone)
    if settings.metric not in known:
        raise UserError(f"metric={settings.metric} will not be measured; {suggestion(settings.metric, known)}")
    derived = derive(settings, optimization, len(dataset.train), plan.world_size)
    return Pieces(dataset, untrained, module, data, evaluation, derived)


def require_meaning(settings: Settings, method: Method, ranks: int) -> None:
    """Methods say what they cannot be combined with.

    Raises:
        UserError: a group, the number of views or the size of a batch has no meaning for this method.
    """
    for group, reason in method.refuses.items():
        if settings.groups()[group]["_target_"] is not None:
            raise UserError(f"{group}: {reason}")
    views = len(settings.augment.get("views", [None] * method.takes[0]))
    fewest, most = method.takes
    if not fewest <= views <= most:
        span = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise UserError(
            f"augment.views lists {views} views, and {type(method).__name__} takes {span}; change the list."
        )
    method.require_batch(settings.loader.batch_size * ranks)
    batch, queues = settings.loader.batch_size, [m for m in method.modules() if isinstance(m, Queue)]
    if any(len(queue.keys) < batch for queue in queues):
        raise UserError(
            f"method.queue_size={len(queues[0].keys)} cannot hold one batch, loader.batch_size={batch}; "
            f"set it to {batch} or more."
        )


def build_as(kind: type[Built], node: Mapping[str, Any], *handed_over: Any) -> Built:
    """`config.build`, for a group that must give a `kind`."""
    built = build(node, *handed_over)
    if not isinstance(built, kind):
        raise UserError(f"{node['_target_']} gives {type(built).__name__}, and a {kind.__name__} is needed.")
    return built


def derive(settings: Settings, optimization: Optimization, images: int, world_size: int) -> dict[str, float]:
    """Numbers that follow from the config; shown and saved, never written back into it.

    Raises:
        UserError: a batch is larger than the training split, or cannot be shared by the devices.
    """
    loader, trainer = settings.loader, settings.trainer
    if loader.batch_size > images:
        raise UserError(
            f"loader.batch_size={loader.batch_size} is larger than the training split; set it to {images} or less."
        )
    if loader.batch_size % world_size:
        fair = max(1, loader.batch_size // world_size) * world_size
        raise UserError(
            f"loader.batch_size={loader.batch_size} cannot be shared by {world_size} devices; set it to {fair}."
        )
    batches = min(images // loader.batch_size, trainer.limit_train_batches or images)
    steps = -(-batches // trainer.accumulate_grad_batches)
    global_batch = loader.batch_size * trainer.accumulate_grad_batches
    return {
        "training_images": images,
        "global_batch": global_batch,
        "steps_per_epoch": steps,
        "total_steps": steps * trainer.max_epochs,
        "effective_learning_rate": optimization.effective_lr(global_batch),
    }


def in_words(derived: Mapping[str, float]) -> str:
    """Derived values in one line."""
    return "   ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in derived.items())


def make_trainer(
    settings: Settings, plan: Plan, folder: RunFolder, pieces: Pieces, throughput: Throughput, loggers: list[Any]
) -> pl.Trainer:
    """Lightning's Trainer with the callbacks of every run."""
    for chatty in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    t = settings.trainer
    callbacks: list[Callback] = [
        Checkpoints(
            folder.checkpoint,
            every_n_epochs=t.checkpoint_every_n_epochs,
            every_n_minutes=t.checkpoint_every_n_minutes,
        ),
        throughput,
    ]
    if t.online_every_n_epochs and pieces.dataset.evaluated.classified:
        channels = pieces.module.method.backbone.channels
        watch = OnlineEvaluation(
            pieces.dataset, int(channels), every_n_epochs=t.online_every_n_epochs, seed=settings.seed
        )
        callbacks.append(watch)
    callbacks.append(RichProgressBar() if sys.stdout.isatty() else EpochLines(throughput))
    strategy: Strategy | str = "auto"
    if plan.world_size > 1:
        backend = "gloo" if plan.accelerator == "cpu" else None
        # Buffers are equal on all ranks by themselves; a broadcast would overwrite a queue.
        strategy = DDPStrategy(process_group_backend=backend, broadcast_buffers=False)
    return pl.Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        num_nodes=plan.nodes,
        strategy=strategy,
        precision=plan.precision,
        max_epochs=t.max_epochs,
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.gradient_clip_val,
        log_every_n_steps=t.log_every_n_steps,
        limit_train_batches=t.limit_train_batches,
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpoint()],
        default_root_dir=folder.path,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
