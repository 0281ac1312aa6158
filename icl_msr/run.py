"""The main job: compose, check, pre-train, evaluate, report.

python -m icl_msr.run method=moco regularizer=msr
"""

import copy
import json
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from rich.console import Console

from icl_msr import __version__, pictures
from icl_msr.callbacks import EpochLines, OnlineEvaluation, Throughput
from icl_msr.checkpoint import export_encoder
from icl_msr.command import main
from icl_msr.config import Settings, build, check, fingerprint, suggestion
from icl_msr.data.datamodule import DataModule
from icl_msr.data.dataset import Dataset
from icl_msr.encoders import Backbone
from icl_msr.errors import UserError
from icl_msr.evaluation.suite import Evaluation, Results
from icl_msr.hardware import Hardware, Plan
from icl_msr.methods import Method
from icl_msr.optimization import Optimization
from icl_msr.pretraining import Pretraining
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.report import gap_table, matrix_table, write_report
from icl_msr.report.runs import Run
from icl_msr.report.words import answer

Built = TypeVar("Built")


def run(config: DictConfig) -> float:
    """One run, in Hydra's output folder; returns the metric that a sweeper maximises."""
    began = time.perf_counter()
    settings = check(config)
    choices = {group: str(HydraConfig.get().runtime.choices[group]) for group in settings.groups()}
    name = "-".join(choices[group] for group in ("method", "regularizer", "negatives", "dataset", "backbone"))
    folder = Path(HydraConfig.get().runtime.output_dir)
    pl.seed_everything(settings.seed, verbose=False)

    plan = build_as(Hardware, settings.hardware).plan()
    dataset = build_as(Dataset, settings.dataset)
    backbone = build(settings.backbone, dataset.image_size)
    untrained = copy.deepcopy(backbone)
    method = build_as(Method, settings.method, backbone)  # type: ignore[type-abstract]
    regularizer: MetaSemanticRegularizer | None = build(settings.regularizer, backbone.channels, method.temperature)
    optimization = build_as(Optimization, settings.optimizer)
    evaluation: Evaluation | None = build(settings.evaluation)
    module = Pretraining(method, regularizer, optimization, seed=settings.seed, batch_size=settings.loader.batch_size)
    data = DataModule(
        dataset,
        build(settings.augment),
        build(settings.negatives),
        seed=settings.seed,
        channels_last=plan.channels_last,
        **settings.loader.model_dump(),
    )
    if plan.channels_last:
        module.to(memory_format=torch.channels_last)

    derived = derive(settings, optimization, len(dataset.train))
    about = environment(settings, plan)
    OmegaConf.save(config, folder / "config.yaml")
    write_json(folder / "environment.json", about)
    console = Console()
    console.print(f"[bold]{name}[/bold] on {plan}\n{facts(derived)}\n{folder}", highlight=False, soft_wrap=True)

    throughput = Throughput(settings.loader.batch_size)
    trainer = make_trainer(settings, plan, folder, dataset, throughput)
    trainer.fit(module, data)

    final = {key: float(value) for key, value in trainer.callback_metrics.items()}
    images = {"image_size": dataset.image_size, "mean": dataset.mean, "std": dataset.std, "dataset": dataset.name}
    export_encoder(backbone, folder, {**images, "choices": choices, "icl_msr": __version__})
    results = Results()
    if evaluation is not None:
        results = evaluation(backbone, dataset, device=plan.device, seed=settings.seed, untrained_encoder=untrained)
        np.savez_compressed(folder / "predictions.npz", **results.predictions)  # type: ignore[arg-type]
    draw(folder / "figures", data, module.to(plan.device), results)
    summary = {
        "name": name,
        "choices": choices,
        "seed": settings.seed,
        "train_on": settings.dataset.get("train_on", "full"),
        "classes": list(dataset.classes),
        "chance": dataset.chance,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "derived": derived,
        "images_per_second": throughput.rate,
        "peak_memory_mb": peak_memory_mb(plan),
        "wall_time_s": time.perf_counter() - began,
        "final": final,
        **results.records(),
    }
    write_json(folder / "results.json", summary)
    report = write_report(folder)
    saved = Run.load(folder).results
    if evaluation is not None:
        for part in (matrix_table(saved), gap_table(saved), " ".join(answer(saved))):
            if part is not None:
                console.print(part)
    console.print(f"results  {folder / 'results.json'}\nreport   {report}", highlight=False, soft_wrap=True)
    return metric(settings.metric, final, results)


def build_as(kind: type[Built], node: Mapping[str, Any], *handed_over: Any) -> Built:
    """`config.build`, for a group that must give a `kind`."""
    built = build(node, *handed_over)
    if not isinstance(built, kind):
        raise UserError(f"{node['_target_']} gives {type(built).__name__}, and a {kind.__name__} is needed.")
    return built


def derive(settings: Settings, optimization: Optimization, images: int) -> dict[str, float]:
    """Numbers that follow from the config; shown and saved, never written back into it.

    Raises:
        UserError: a batch is larger than the training split.
    """
    loader, trainer = settings.loader, settings.trainer
    if loader.batch_size > images:
        raise UserError(
            f"loader.batch_size={loader.batch_size} is larger than the training split; set it to {images} or less."
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


def facts(derived: Mapping[str, float]) -> str:
    """Derived values in one line."""
    return "   ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in derived.items())


def make_trainer(settings: Settings, plan: Plan, folder: Path, dataset: Dataset, throughput: Throughput) -> pl.Trainer:
    """Lightning's Trainer with the callbacks of every run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    t = settings.trainer
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder / "checkpoints", "last", every_n_epochs=t.checkpoint_every_n_epochs, enable_version_counter=False
        ),
        throughput,
    ]
    if t.online_every_n_epochs:
        callbacks.append(OnlineEvaluation(dataset, every_n_epochs=t.online_every_n_epochs, seed=settings.seed))
    callbacks.append(RichProgressBar() if sys.stdout.isatty() else EpochLines(throughput))
    return pl.Trainer(
        accelerator=plan.accelerator,
        devices=plan.devices,
        precision=plan.precision,
        max_epochs=t.max_epochs,
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.gradient_clip_val,
        log_every_n_steps=t.log_every_n_steps,
        limit_train_batches=t.limit_train_batches,
        logger=[CSVLogger(folder, name="", version=""), *build_logger(settings, folder)],
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def build_logger(settings: Settings, folder: Path) -> list[Any]:
    """The chosen logger, if any, beside the CSV files that are always written."""
    logger = build(settings.logger, folder)
    return [] if logger is None else [logger]


def draw(folder: Path, data: DataModule, module: Pretraining, results: Results) -> None:
    """The grids of the report."""
    folder.mkdir(exist_ok=True)
    dataset, method, regularizer = data.dataset, module.method, module.regularizer
    views = next(data.epoch(0, module.device))
    captions = {"views.png": pictures.views_grid(views, dataset.mean, dataset.std, folder / "views.png")}
    if views.negatives is not None:
        captions["negatives.png"] = pictures.negatives_grid(views, dataset.mean, dataset.std, folder / "negatives.png")
    if regularizer is not None and isinstance(method.backbone, Backbone):
        with torch.no_grad():
            strata = regularizer.strata(views.images)
        captions["strata.png"] = pictures.strata_grid(
            method.backbone, strata[:10], views.images[:10], dataset.mean, dataset.std, folder / "strata.png"
        )
    if results.features:
        split = "mixed_rand" if "mixed_rand" in dataset.tests else next(iter(dataset.tests))
        captions["neighbours.png"] = pictures.neighbours_grid(
            dataset, results.features["trained"], split, folder / "neighbours.png"
        )
    write_json(folder / "captions.json", captions)


def environment(settings: Settings, plan: Plan) -> dict[str, Any]:
    """Where a number comes from."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": "python -m icl_msr.run " + " ".join(HydraConfig.get().overrides.task),
        "commit": commit.stdout.strip() or None,
        "config_hash": fingerprint(settings),
        "icl_msr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("pytorch_lightning"),
        "hardware": str(plan),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory_mb(plan: Plan) -> float:
    """Peak memory of the training device so far, in MB (of the process on a CPU)."""
    if plan.accelerator == "gpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def metric(name: str, final: Mapping[str, float], results: Results) -> float:
    """The value that a sweeper maximises.

    `classifier/fitted_on/split` names an accuracy of the evaluation, anything else a logged value. `auto` is the
    accuracy that rewards the background least: the linear probe before kNN, fitted on the balanced split before train,
    on `mixed_rand` before other splits; without an evaluation, the online kNN.
    """
    values = dict(final)
    for r in results.accuracies:
        if r["encoder"] == "trained":
            values["/".join((r["classifier"], r["fitted_on"], r["split"]))] = r["top1"]
    if name == "auto":
        accuracies = [key for key in values if key.count("/") == 2]
        name = min(
            accuracies or ["online/knn"],
            key=lambda k: (not k.startswith("linear/"), "/balanced/" not in k, not k.endswith("/mixed_rand")),
        )
    elif name not in values:
        raise UserError(f"metric={name} was not measured; {suggestion(name, values)}")
    return values.get(name, float("nan"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Plain data, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(run))
