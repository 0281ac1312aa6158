"""Build and check all parts of a run before anything is written."""

import copy
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy, Strategy

from icl_msr.augment import Augmentation, Background
from icl_msr.core.config import Settings, build, build_as, require_kind, suggestion
from icl_msr.core.errors import UserError, reason
from icl_msr.core.folder import RunFolder
from icl_msr.core.memory import require_memory
from icl_msr.core.ranks import is_rank
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.suite import Evaluation, Measures
from icl_msr.losses.hard_negatives import HardNegatives
from icl_msr.methods import Method
from icl_msr.models.backbones import Backbone, evaluating
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.models.momentum import Queue
from icl_msr.negatives.cached import CachedNegatives
from icl_msr.regularizers import MetaSemanticRegularizer, Regularizer
from icl_msr.training.checkpoint import AtomicCheckpoint
from icl_msr.training.datamodule import DataModule
from icl_msr.training.hardware import Plan
from icl_msr.training.loggers import About, MetricsFile
from icl_msr.training.module import Pretraining
from icl_msr.training.online import OnlineEvaluation
from icl_msr.training.optimization import Optimization
from icl_msr.training.progress import Throughput

LOGGED = ("loss", "loss/contrastive", "online/knn", "online/probe")
"""Logged values that a sweeper may maximise."""


@dataclass
class Pieces:
    """The parts of a run, built and checked."""

    dataset: Dataset
    untrained: torch.nn.Module
    module: Pretraining
    data: DataModule
    evaluations: list[Measures]
    throughput: Throughput
    derived: dict[str, float]
    without_maps: str | None = None
    """Why the maps of the strata are not drawn, if they cannot be."""


def assemble(settings: Settings, plan: Plan) -> Pieces:
    """Build and check all parts of a run, before anything is written.

    Raises:
        UserError: a part cannot be built, or the parts do not fit together.
    """
    pl.seed_everything(settings.seed, verbose=False)
    for logger in settings.logger.values():  # they are built when the run begins
        require_kind(Logger, logger)
    dataset = build_as(Dataset, settings.dataset)
    backbone = build_as(Backbone, settings.backbone, image_size=dataset.image_size)
    augmentation = build_as(Augmentation, settings.augment)
    facts = {"classes": len(dataset.classes), "mean": dataset.mean, "std": dataset.std}
    method = build_as(Method, settings.method, backbone=backbone, **facts)  # type: ignore[type-abstract]
    if settings.hard_negatives["_target_"] is not None:
        method.hard_negatives = build_as(HardNegatives, settings.hard_negatives)  # type: ignore[type-abstract]
    require_meaning(settings, method, plan.world_size)
    negatives = build(settings.negatives)
    if negatives is not None and not hasattr(negatives, "alpha"):
        raise UserError(f"{settings.negatives['_target_']} has no alpha, the weight of its negatives; choose another.")
    require_sizes(method.backbone, negatives, dataset.image_size, augmentation, settings.loader.batch_size)
    background = None if settings.background["_target_"] is None else build_as(Background, settings.background)
    untrained = copy.deepcopy(method.backbone)
    regularizer: Regularizer | None = None
    if settings.regularizer["_target_"] is not None:
        facts = {"channels": method.channels, "method_temperature": method.temperature, "dataset": dataset}
        regularizer = build_as(Regularizer, settings.regularizer, **facts)  # type: ignore[type-abstract]
    if plan.world_size > 1 and not method.own_statistics:
        global_batch_norm(method)
    optimization = make_optimization(settings)
    module = Pretraining(
        method,
        regularizer,
        optimization,
        seed=settings.seed,
        batch_size=settings.loader.batch_size,
        config=settings.model_dump(),
    )
    if plan.channels_last:
        module.to(memory_format=torch.channels_last)
    if plan.compile:
        for part in filter(lambda part: isinstance(part, Backbone), method.modules()):
            part.compile(dynamic=False)
    loader = settings.loader.model_dump()
    if settings.loader.whole_images is None:
        loader["whole_images"] = regularizer is not None
    data = DataModule(
        dataset,
        augmentation,
        negatives,
        seed=settings.seed,
        channels_last=plan.channels_last,
        background=background,
        **loader,
    )
    evaluations = [build_as(Measures, node) for node in settings.evaluation.values()]  # type: ignore[type-abstract]
    online = any(resolve_name(node["_target_"]) is OnlineEvaluation for node in settings.callbacks.values())
    watched = LOGGED if online and dataset.evaluated.classified else LOGGED[:2]
    logged = [name for name in watched if dataset.labelled is None or name != "online/probe"]
    known = ["auto", *logged, *(name for evaluation in evaluations for name in evaluation.names(dataset.evaluated))]
    for evaluation in evaluations:
        if isinstance(evaluation, Evaluation):
            evaluation.require(method.backbone)
    if settings.metric not in known:
        raise UserError(f"metric={settings.metric} will not be measured; {suggestion(settings.metric, known)}")
    derived = derive(settings, optimization, len(dataset.train), plan.world_size)
    throughput = Throughput(settings.loader.batch_size)
    drawn = isinstance(regularizer, MetaSemanticRegularizer)
    unmapped = why_without_maps(untrained, dataset.image_size) if drawn else None
    return Pieces(dataset, untrained, module, data, evaluations, throughput, derived, unmapped)


def require_sizes(
    backbone: Backbone, negatives: Any, image_size: int, augmentation: Augmentation, batch_size: int
) -> None:
    """Check that the backbone takes the images that it will be measured on, and views of each size.

    A generator of negatives must take the first view.

    Raises:
        UserError: one of them cannot take them, or the views of a batch need more memory than there is.
    """
    sides = [recipe.size or image_size for recipe in augmentation.recipes]
    needed = 12.0 * batch_size * sum(side**2 for side in sides)  # three channels in float32
    require_memory(f"Views of {max(sides)} pixels of {batch_size} images", needed, "choose smaller or fewer ones")
    backbone.require_size(image_size, "set another dataset.image_size, or choose another backbone")
    for size in sorted({*sides} - {image_size}):
        backbone.require_size(size, "change the size in augment.size or augment.views, or choose another backbone")
    if negatives is None or isinstance(negatives, CachedNegatives):
        return
    try:
        negatives(torch.zeros(2, 3, sides[0], sides[0]), torch.arange(2))
    except Exception as error:
        raise UserError(
            f"{type(negatives).__name__} cannot make negatives of views of {sides[0]} pixels ({reason(error)}); choose "
            "larger views or other negatives."
        ) from None


def why_without_maps(backbone: Backbone, image_size: int) -> str | None:
    """Return why a backbone has no feature maps that can be drawn; None if it has them."""
    try:
        with torch.no_grad(), evaluating(backbone):
            backbone.maps(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:
        return reason(error)
    return None


def make_optimization(settings: Settings) -> Optimization:
    """Return the optimiser and the schedule of a config.

    Raises:
        UserError: the optimiser or the schedule cannot be built from its arguments.
    """
    optimizer = partial(build_as, torch.optim.Optimizer, settings.optimizer)
    schedule = partial(build_as, torch.optim.lr_scheduler.LRScheduler, settings.schedule)
    optimization = Optimization(optimizer, schedule, settings.bias_and_norm)
    try:
        optimization.effective_lr(1)
    except KeyError:
        raise UserError(
            f"schedule._target_={settings.schedule['_target_']} follows a metric, and schedules follow the optimiser's "
            "steps here; choose another."
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"The optimizer or its schedule cannot be built: {_one_line(error)}.") from None
    return optimization


def require_meaning(settings: Settings, method: Method, ranks: int) -> None:
    """Check that the method can be combined with the other parts of the config.

    Raises:
        UserError: a group, the number of views or the batch size does not fit the method.
    """
    groups = settings.groups()
    for group, why in method.refuses.items():
        if group in groups and groups[group]["_target_"] is not None:
            raise UserError(f"{group}: {why}")
    if method.hard_negatives is not None and method.hard_negatives.synthetic and "synthetic" in method.refuses:
        raise UserError(f"hard_negatives: {method.refuses['synthetic']}")
    views = len(settings.augment.get("views", [None] * method.takes[0]))
    fewest, most = method.takes
    if not fewest <= views <= most:
        span = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise UserError(
            f"augment.views lists {views} views, and {type(method).__name__} takes {span}; change the list."
        )
    if method.own_statistics and ranks == 1:
        raise UserError(
            "method.shuffle_batch_norm=true needs two devices or more, because the images of one share their "
            "statistics; type hardware.devices=2, or method.shuffle_batch_norm=false."
        )
    method.require_batch(settings.loader.batch_size * ranks)
    batch, queues = settings.loader.batch_size, [m for m in method.modules() if isinstance(m, Queue)]
    if any(len(queue.keys) < batch for queue in queues):
        raise UserError(
            f"method.queue_size={len(queues[0].keys)} cannot hold one batch, loader.batch_size={batch}; "
            f"set it to {batch} or more."
        )


def derive(settings: Settings, optimization: Optimization, images: int, world_size: int) -> dict[str, float]:
    """Return numbers that follow from the config, such as the steps of an epoch.

    They are shown and saved, but never written back into the config. Training itself uses Lightning's
    `trainer.estimated_stepping_batches`, which agrees with them.

    Raises:
        UserError: a batch is larger than the training split or cannot be shared by the devices, or the run has no end.
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
    epochs, steps_at_most = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    accumulated, batches = trainer.get("accumulate_grad_batches", 1), images // loader.batch_size
    if accumulated < 1:
        raise UserError(f"trainer.accumulate_grad_batches={accumulated} is not allowed; it should be at least 1.")
    limit = trainer.get("overfit_batches") or trainer.get("limit_train_batches")
    if trainer.get("fast_dev_run"):
        limit, epochs, steps_at_most = int(trainer["fast_dev_run"]), 1, -1
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if epochs in (None, -1) and steps_at_most == -1:
        raise UserError(
            f"trainer.max_epochs={'null' if epochs is None else epochs} needs trainer.max_steps=<number>, because "
            "schedules follow the length of a run; trainer.max_time can only end it earlier."
        )
    steps = -(-batches // accumulated)
    total = steps * epochs if epochs not in (None, -1) else steps_at_most
    global_batch = loader.batch_size * accumulated
    return {
        "training_images": images,
        "global_batch": global_batch,
        "steps_per_epoch": steps,
        "total_steps": min(total, steps_at_most) if steps_at_most != -1 else total,
        "effective_learning_rate": optimization.effective_lr(global_batch),
    }


def in_words(derived: Mapping[str, float]) -> str:
    """Return the derived values as one line of text."""
    return "   ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in derived.items())


def make_trainer(settings: Settings, plan: Plan, folder: RunFolder, pieces: Pieces) -> pl.Trainer:
    """Return Lightning's Trainer with the callbacks of this run. Its loggers are added when the run begins.

    Raises:
        UserError: Lightning refuses an argument.
    """
    for chatty in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for asked_for in ("profilers", "callbacks.model_summary"):
        logging.getLogger(f"pytorch_lightning.{asked_for}").setLevel(logging.INFO)
    known = {"dataset": pieces.dataset, "channels": int(pieces.module.method.backbone.channels), "seed": settings.seed}
    known |= {"checkpoint": folder.checkpoint, "throughput": pieces.throughput}
    callbacks = [build_as(Callback, node, **known) for node in settings.callbacks.values()]
    node = dict(settings.trainer)
    if node.get("enable_progress_bar") is None:
        node["enable_progress_bar"] = sys.stdout.isatty()
    strategy: Strategy | str = "auto"
    if plan.world_size > 1:
        # Buffers are already equal on all ranks. A broadcast would overwrite a queue.
        strategy = DDPStrategy(broadcast_buffers=False)
    try:
        return build_as(
            pl.Trainer,
            node,
            accelerator=plan.accelerator,
            devices=plan.devices,
            num_nodes=plan.nodes,
            strategy=strategy,
            precision=plan.precision,
            logger=False,
            callbacks=[pieces.throughput, *callbacks],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            # Lightning would otherwise guess from SLURM's variables and the job's name.
            plugins=[AtomicCheckpoint(), TorchElasticEnvironment() if is_rank() else LightningEnvironment()],
            default_root_dir=folder.path,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"The trainer cannot be built: {_one_line(error)}.") from None


def make_loggers(settings: Settings, folder: RunFolder, about: About) -> list[Logger]:
    """Return the logger of `metrics.csv` and the configured loggers. A `fast_dev_run` has only the first one."""
    beside = [] if settings.trainer.get("fast_dev_run") else settings.logger.values()
    known = {"folder": folder.path, "about": about, "save_dir": str(folder.path)}
    made = [build_as(Logger, node, **known) for node in beside]  # type: ignore[type-abstract]
    return [MetricsFile(folder.path, about), *made]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
