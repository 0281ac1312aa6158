"""The main job: compose, check, pre-train, evaluate, report.

python -m icl_msr.run method=moco regularizer=msr
"""

import copy
import json
import logging
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.strategies import DDPStrategy, Strategy
from rich.console import Console

from icl_msr import __version__
from icl_msr.cli.command import main
from icl_msr.cli.processes import in_folder, require_processes, run_ranks
from icl_msr.cli.sweeps import job_type, sweep_group
from icl_msr.core.config import Settings, build, check, fingerprint, suggestion
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import is_first, is_rank
from icl_msr.core.storage import atomic_write, disk_is_full
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation import pictures
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.strata_maps import Look, look, measure, split_with_masks
from icl_msr.evaluation.suite import Evaluation, Results
from icl_msr.methods import Method
from icl_msr.models.backbones import Backbone
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.models.checkpoint import read_checkpoint
from icl_msr.models.exported import export_encoder
from icl_msr.models.momentum import Queue
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.report import gap_table, matrix_table, write_report
from icl_msr.report.runs import Run, flatten, read_curves
from icl_msr.report.words import answer, faint_meta_signal
from icl_msr.training.checkpoint import AtomicCheckpoint
from icl_msr.training.checkpoints import Checkpoints
from icl_msr.training.datamodule import DataModule
from icl_msr.training.hardware import Hardware, Plan
from icl_msr.training.loggers import About, MetricsFile
from icl_msr.training.module import Pretraining
from icl_msr.training.online import OnlineEvaluation
from icl_msr.training.optimization import Optimization
from icl_msr.training.progress import EpochLines, Throughput

Built = TypeVar("Built")

LOGGED = ("loss", "loss/contrastive", "online/knn", "online/probe")
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


def run(config: DictConfig) -> float:
    """One run, in Hydra's output folder; returns the metric that a sweeper maximises.

    A folder in which the same run was begun is continued, and one in which it was finished is left as it is.
    """
    settings = check(config)
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    console = Console(highlight=False, soft_wrap=True, quiet=not is_first())
    extended = folder.begun and more_epochs(settings, folder)
    if folder.done and not extended:
        console.print(f"{folder} is finished and stays as it is; continue it with a larger trainer.max_epochs.")
        return folder.metric()

    plan = build_as(Hardware, settings.hardware).plan()
    supervise = plan.world_size > 1 and not is_rank()
    require_processes(plan, multirun=HydraConfig.get().mode == RunMode.MULTIRUN)
    pieces = assemble(settings, plan)
    require_room(pieces.module, folder.path)
    if supervise:
        del pieces
        code = run_ranks(plan.world_size, [*sys.argv[1:], in_folder(folder.path)], folder.path)
        return folder.metric() if code == 0 else sys.exit(code)
    with folder.locked() if is_first() else nullcontext():
        return carry_out(settings, config, plan, pieces, folder, console)


def carry_out(
    settings: Settings, config: DictConfig, plan: Plan, pieces: Pieces, folder: RunFolder, console: Console
) -> float:
    """Trains with the other ranks, if any; the first one then evaluates and reports."""
    began = time.perf_counter()
    resumed_at = resume_point(settings, pieces, folder, console)
    facts = describe(settings, plan, pieces.dataset, folder)
    about = About(
        name=facts["name"],
        group=facts["group"],
        job_type=facts["job_type"],
        config=settings.model_dump(),
        resumed_at=resumed_at,
    )
    dashboard = build(settings.logger, folder.path, about)
    if is_first():
        folder.results.unlink(missing_ok=True)  # of the run before it was given more epochs
        folder.write(folder.environment.name, facts)
        atomic_write(folder.config, OmegaConf.to_yaml(config))
    console.print(f"[bold]{about.name}[/bold] on {plan}\n{in_words(pieces.derived)}\n{folder}")

    with closing(dashboard):
        throughput = Throughput(settings.loader.batch_size)
        loggers = [MetricsFile(folder.path, about), *([dashboard] if dashboard else [])]
        trainer = make_trainer(settings, plan, folder, pieces, throughput, loggers)
        trainer.fit(
            pieces.module,
            pieces.data,
            ckpt_path=folder.checkpoint if resumed_at is not None else None,
            weights_only=True,
        )
        if dist.is_initialized():
            dist.destroy_process_group()
        if not trainer.is_global_zero:
            return math.nan
        results = evaluate(settings, plan, pieces, folder, facts["choices"])
        final = {name: curve.values[-1] for name, curve in read_curves(folder.path / "metrics.csv").items()}
        name, value = metric(settings.metric, final, results)
        summary = {
            "name": about.name,
            "choices": facts["choices"],
            "seed": settings.seed,
            "train_on": settings.dataset.get("train_on", "full"),
            "classes": list(pieces.dataset.classes),
            "chance": pieces.dataset.chance,
            "parameters": sum(p.numel() for p in pieces.module.method.backbone.parameters()),
            "derived": pieces.derived,
            "images_per_second": throughput.rate,
            "peak_memory_mb": peak_memory_mb(plan),
            "wall_time_s": throughput.earlier + time.perf_counter() - began,
            "metric": {"name": name, "value": value if math.isfinite(value) else None},
            "final": final,
            **results.records(),
            "strata": looks(settings, plan, pieces),
        }
        folder.write(folder.results.name, summary)
        report = write_report(folder.path)
        if dashboard is not None:
            dashboard.conclude(folder.path)
    finished = Run.load(folder.path)
    saved = finished.results
    if results.accuracies:
        for part in (matrix_table(saved), gap_table(saved), " ".join(answer(saved))):
            if part is not None:
                console.print(part)
    if warning := faint_meta_signal(finished.curves, settings.regularizer):
        console.print(warning, style="yellow")
    console.print(f"results  {folder.results}\nreport   {report}")
    return value


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
    logged = [name for name in LOGGED if settings.trainer.online_every_n_epochs or not name.startswith("online/")]
    known = ["auto", *logged, *(evaluation.names(dataset) if evaluation else [])]
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


def more_epochs(settings: Settings, folder: RunFolder) -> bool:
    """Whether the run in this folder is to be given more epochs than it had.

    Raises:
        UserError: another run lies there.
    """
    saved, now = flatten(folder.saved_config()), flatten(settings.model_dump())
    epochs = "trainer.max_epochs"
    for key in dict.fromkeys([*now, *saved]):
        if saved.get(key) != now.get(key) and (key != epochs or now[key] < saved.get(key, 0)):
            raise UserError(
                f"{folder} holds a run with {key}={saved.get(key)}, and {now.get(key)} was asked for; a run is "
                f"continued as it was begun, only {epochs} may grow: choose another hydra.run.dir, or "
                f"type resume={folder}."
            )
    return bool(now[epochs] > saved[epochs])


def require_room(module: Pretraining, folder: Path) -> None:
    """A new checkpoint is written beside the old one.

    Raises:
        UserError: they do not fit on the disk, or nothing can be written there.
    """
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        if not disk_is_full(error):
            raise UserError(f"{folder} cannot be written ({error.strerror}); choose another hydra.run.dir.") from None
    state = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    moments = [p for p in module.parameters() if p.requires_grad] * 2
    needed = 2 * sum(t.numel() * t.element_size() for t in [*state, *moments])
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"The disk of {folder} is full: checkpoints need {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
            "make room or choose another hydra.run.dir."
        )


def resume_point(settings: Settings, pieces: Pieces, folder: RunFolder, console: Console) -> int | None:
    """The optimiser step to continue from, said in words; None for a fresh start."""
    if not (folder.begun and folder.checkpoint.exists()):
        return None
    checkpoint = read_checkpoint(folder.checkpoint)
    if shapes(checkpoint["state_dict"]) != shapes(pieces.module.state_dict()):
        raise UserError(
            f"{folder.checkpoint} belongs to another config than {folder.config}; put the one back that it was "
            "trained with, or begin a new run."
        )
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{folder.checkpoint} holds no state of the optimiser, so training cannot go on from it; put the run's own "
            "checkpoint back, or begin a new run with backbone.weights."
        )
    step = int(checkpoint["global_step"])
    console.print(f"Continuing {folder} from step {step}.")
    before, now = folder.saved_config()["trainer"]["max_epochs"], settings.trainer.max_epochs
    if now > before:
        rate, steps = pieces.module.optimization.factor, pieces.derived["steps_per_epoch"]
        lr = pieces.derived["effective_learning_rate"]
        old, new = (lr * rate(step, int(steps * epochs), steps) for epochs in (before, now))
        console.print(
            f"{before} epochs become {now}: the schedule ({settings.optimizer.get('schedule')}) ends at epoch {now} "
            f"now, so the learning rate at this step is {new:.3g} instead of {old:.3g}."
        )
    return step


def shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Of the tensors of a state dict."""
    return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}


@contextmanager
def closing(dashboard: Any) -> Iterator[None]:
    """The dashboard learns how the run ended, however it ended."""
    code = 1
    try:
        yield
        code = 0
    except UserError:
        code = 2
        raise
    except SystemExit as stop:
        code = int(stop.code or 0)
        raise
    finally:
        if dashboard is not None:
            dashboard.close(code)


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
    if t.online_every_n_epochs:
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


def evaluate(settings: Settings, plan: Plan, pieces: Pieces, folder: RunFolder, choices: Mapping[str, str]) -> Results:
    """Exports the encoder, measures it, and draws the pictures of the report."""
    backbone, dataset = pieces.module.method.backbone, pieces.dataset
    assert isinstance(backbone, Backbone)
    export_encoder(backbone, folder.path, {**image_facts(dataset), "choices": choices, "icl_msr": __version__})
    results = Results()
    if pieces.evaluation is not None:
        results = pieces.evaluation(
            backbone, dataset, device=plan.device, seed=settings.seed, untrained_encoder=pieces.untrained
        )
        results.save(folder.path)
    draw(folder.path / "figures", pieces.data, pieces.module.to(plan.device), results)
    return results


def looks(settings: Settings, plan: Plan, pieces: Pieces) -> Look | None:
    """What the strata look at; None without strata, evaluation, or a test split that knows where its objects are."""
    dataset, backbone, regularizer = pieces.dataset, pieces.module.method.backbone, pieces.module.regularizer
    split = split_with_masks(dataset)
    if regularizer is None or split is None or not isinstance(backbone, Backbone):
        return None
    if not isinstance(pieces.evaluation, Evaluation):  # none, or one without a bootstrap
        return None
    found = measure(
        backbone,
        regularizer.strata,
        dataset.tests[split],
        mean=dataset.mean,
        std=dataset.std,
        device=plan.device,
        images=1000,
        batch_size=pieces.evaluation.batch_size,
    )
    return look(found, split, Bootstrap(pieces.evaluation.bootstrap, settings.seed))


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
        captions["weights.png"] = pictures.weights_figure(strata, folder / "weights.png")
    if results.features:
        captions |= pictures.feature_pictures(dataset, results.features["trained"], folder)
    atomic_write(folder / "captions.json", json.dumps(captions, indent=2))


def image_facts(dataset: Dataset) -> dict[str, Any]:
    """What an encoder of this data set must be fed with."""
    return {"image_size": dataset.image_size, "mean": dataset.mean, "std": dataset.std, "dataset": dataset.name}


def describe(settings: Settings, plan: Plan, dataset: Dataset, folder: RunFolder) -> dict[str, Any]:
    """Where a number comes from. A run that goes on keeps what it was begun with and adds how it was continued."""
    checkout = Path(__file__).parents[1] / ".git"  # an installed package may lie in somebody else's
    git = ["git", "--git-dir", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    now = {
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
    if folder.begun and folder.environment.exists():
        begun = folder.facts()
        return {**begun, "continued": [*begun.get("continued", []), now]}
    choices = {group: str(HydraConfig.get().runtime.choices[group]) for group in settings.groups()}
    name = "-".join(choices[group] for group in ("method", "regularizer", "negatives", "dataset", "backbone"))
    place = {"group": sweep_group(), "job_type": job_type(HydraConfig.get().overrides.task)}
    return {"name": name, **place, **now, "choices": choices, "images": image_facts(dataset)}


def peak_memory_mb(plan: Plan) -> float:
    """Peak memory of the training device so far, in MB (of the process on a CPU)."""
    if plan.accelerator == "gpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def metric(name: str, final: Mapping[str, float], results: Results) -> tuple[str, float]:
    """Name and value of what a sweeper maximises.

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
            key=lambda k: (not k.startswith("linear"), "/balanced/" not in k, not k.endswith("/mixed_rand")),
        )
    return name, values.get(name, math.nan)


if __name__ == "__main__":
    sys.exit(main(run))
