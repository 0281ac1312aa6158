"""A run that is small enough for a test, composed and built as in the program."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Checkpoint

from icl_msr.cli.assemble import make_optimization
from icl_msr.core.config import Settings, build, check, config_dir
from icl_msr.data.dataset import Dataset
from icl_msr.training.datamodule import DataModule
from icl_msr.training.module import Pretraining

DATA = ["dataset.train=64", "dataset.test=16", "dataset.balanced=16", "dataset.cache=null"]
MODEL = ["loader.batch_size=8", "method.hidden_dim=16", "method.embedding_dim=8", "schedule.warmup_steps=0"]


def composed(*words: str) -> DictConfig:
    """Return the config of a command line. The caller may change it."""
    return copy.deepcopy(_composed(words))


@cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(words))


@cache
def dataset() -> Dataset:
    """Return 64 small images of shapes."""
    built: Dataset = build(check(composed(*DATA)).dataset)
    return built


def pieces(
    *words: str, data: Dataset | None = None, settings: Settings | None = None
) -> tuple[Settings, Pretraining, DataModule]:
    """Return the settings, the module and the DataModule of a run: of a small one with `words`, or of `settings`."""
    settings = settings or check(composed(*DATA, *MODEL, *words))
    pl.seed_everything(settings.seed, verbose=False)
    data = data or dataset()
    backbone = build(settings.backbone, image_size=data.image_size)
    method = build(settings.method, backbone=backbone, classes=len(data.classes), mean=data.mean, std=data.std)
    method.hard_negatives = build(settings.hard_negatives)
    module = Pretraining(
        method,
        build(settings.regularizer, channels=method.channels, method_temperature=method.temperature, dataset=data),
        make_optimization(settings),
        seed=settings.seed,
        batch_size=settings.loader.batch_size,
    )
    views = [build(settings.augment), build(settings.negatives)]
    keys = settings.loader.model_dump()
    background = build(settings.background)
    return (
        settings,
        module,
        DataModule(data, *views, seed=settings.seed, channels_last=False, background=background, **keys),
    )


def trained(
    *words: str,
    callbacks: list[pl.Callback] | None = None,
    data: Dataset | None = None,
    settings: Settings | None = None,
    **keys: Any,
) -> tuple[Pretraining, pl.Trainer]:
    """Train for some batches, by default two of one epoch, and return the module and its trainer."""
    settings, module, loader = pieces(*words, data=data, settings=settings)
    path = keys.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=keys.pop("max_epochs", 1),
        limit_train_batches=keys.pop("limit_train_batches", 2),
        accumulate_grad_batches=settings.trainer["accumulate_grad_batches"],
        gradient_clip_val=settings.trainer["gradient_clip_val"],
        log_every_n_steps=keys.pop("log_every_n_steps", 1),
        callbacks=callbacks,
        logger=keys.pop("logger", False),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks or []),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **keys,
    )
    trainer.fit(module, loader, ckpt_path=path, weights_only=True)
    return module, trainer


class AfterBatch(pl.Callback):
    """Keeps the values that a function returns for the module after every batch."""

    def __init__(self, look: Callable[[Pretraining], Any]) -> None:
        self.look, self.seen = look, list[Any]()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append(self.look(pl_module))
