"""The main job: one run in its folder, fresh or continued."""

import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from icl_msr.cli.assemble import Pieces, assemble, in_words, make_loggers, make_trainer
from icl_msr.cli.conclude import about, conclude, describe, evaluate, peak_memory_mb, scene_of
from icl_msr.cli.processes import in_folder, requeued, require_processes, run_ranks
from icl_msr.core.config import MOVABLE, UNSEEN, Settings, build_as
from icl_msr.core.distributed import join, leave
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import is_first, is_rank
from icl_msr.core.records import Outcome, chosen_metric
from icl_msr.core.saved import WRITTEN, as_yaml, flatten
from icl_msr.core.signals import stoppable
from icl_msr.core.storage import FULL, atomic_write
from icl_msr.core.terminal import plain_console
from icl_msr.data.dataset import Dataset
from icl_msr.models.checkpoint import read_checkpoint
from icl_msr.report import has_page, write_report
from icl_msr.report.runs import read_curves
from icl_msr.training.hardware import Hardware, Plan
from icl_msr.training.loggers import Dashboard
from icl_msr.training.module import Pretraining


def run(settings: Settings, config: DictConfig) -> float:
    """Train and evaluate in Hydra's output folder, and return the metric that a sweeper maximises.

    A run that was begun in this folder is continued. A finished run is left as it is.
    """
    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    console = plain_console(quiet=not is_first())
    if (metric := finished(settings, folder, console)) is not None:
        return metric

    hardware = build_as(Hardware, settings.hardware)
    plan = hardware.plan()
    supervise = plan.world_size > 1 and not is_rank()
    require_processes(plan, multirun=HydraConfig.get().mode == RunMode.MULTIRUN)
    pieces = assemble(settings, plan)
    require_room(pieces.module, folder.path)
    with requeued(hardware.requeue):
        if supervise:
            del pieces
            code = run_ranks(plan.world_size, [*sys.argv[1:], in_folder(folder.path)], folder.path)
            return folder.metric() if code == 0 else sys.exit(code)
        with folder.locked() if is_first() else nullcontext(), stoppable(folder.farewell):
            # Another command may have finished the run meanwhile. A rank must go on, because the others wait for it.
            if (metric := finished(settings, folder, console)) is not None and not is_rank():
                return metric
            return carry_out(settings, config, plan, pieces, folder, console)


def finished(settings: Settings, folder: RunFolder, console: Console) -> float | None:
    """Return the metric of the run if it lies finished in the folder and needs no more epochs, and print it; else None.

    Raises:
        UserError: another run lies there, or `results.json` is damaged.
    """
    extended = folder.begun and more_epochs(settings, folder)
    if not folder.done or extended:
        return None
    metric = folder.metric()
    console.print(f"{folder} is finished and stays as it is; continue it with a larger trainer.max_epochs.")
    if is_first() and not has_page(folder.path):  # the page may have failed or be cut short
        console.print(f"report   {write_report(folder.path)}")
    return metric


def carry_out(
    settings: Settings, config: DictConfig, plan: Plan, pieces: Pieces, folder: RunFolder, console: Console
) -> float:
    """Train on all ranks, then evaluate and report on the first rank. Return the metric."""
    began = time.perf_counter()
    resumed_at = resume_point(settings, pieces, folder, console)
    trainer = make_trainer(settings, plan, folder, pieces)
    facts = describe(settings, plan, pieces.dataset, folder)
    loggers = make_loggers(settings, folder, about(settings, plan, pieces, facts, resumed_at))
    if is_first():
        folder.results.unlink(missing_ok=True)  # results from before more epochs were asked for
        folder.write_facts(facts)
        atomic_write(folder.config, as_yaml(config))
    console.print(Text.assemble((facts["name"], "bold"), f" on {plan}\n{in_words(pieces.derived)}\n{folder}"))

    for remark in [*pieces.dataset.remarks(), *(pieces.dataset.labelled.remarks() if pieces.dataset.labelled else [])]:
        console.print(remark, style="yellow")
    if pieces.without_maps is not None:
        console.print(f"The strata are not drawn: {pieces.without_maps}.", style="yellow")
    with closing(loggers):
        trainer.loggers = loggers
        if plan.world_size > 1:
            join(plan.accelerator == "gpu")
        trainer.fit(
            pieces.module,
            pieces.data,
            ckpt_path=folder.checkpoint if resumed_at is not None else None,
            weights_only=True,
        )
        leave()
        if not trainer.is_global_zero:
            return math.nan
        results = evaluate(settings, plan, pieces, folder, facts["choices"])
        outcome = Outcome(
            name=facts["name"],
            choices=facts["choices"],
            seed=settings.seed,
            train_on=settings.dataset.get("train_on", "full"),
            classes=list(pieces.dataset.evaluated.classes),
            chance=pieces.dataset.evaluated.chance,
            parameters=sum(p.numel() for p in pieces.module.method.backbone.parameters()),
            derived=pieces.derived,
            images_per_second=pieces.throughput.rate,
            peak_memory_mb=peak_memory_mb(plan),
            wall_time_s=pieces.throughput.earlier + time.perf_counter() - began,
            final={name: curve.values[-1] for name, curve in read_curves(folder.path).items()},
            records=results.records,
        )
        name, value = chosen_metric(settings.metric, outcome)
        outcome.metric = {"name": name, "value": value if math.isfinite(value) else None}
        dashboards = [logger for logger in loggers if isinstance(logger, Dashboard)]
        conclude(folder, outcome, scene_of(pieces, plan, results), dashboards, console)
    return value


def more_epochs(settings: Settings, folder: RunFolder) -> bool:
    """Return whether the config asks for more epochs than the run in this folder had.

    Raises:
        UserError: another run lies there.
    """
    saved, now = flatten(folder.saved_config()), flatten(settings.model_dump())
    epochs = "trainer.max_epochs"
    grows = (now[epochs] or 0) > _epochs(saved)
    # What trains on compares the images with those that the run was begun with.
    free = {*UNSEEN, *(MOVABLE if grows or not folder.done else ())}
    for key in dict.fromkeys([*now, *saved]):
        if key.removeprefix("dataset.") in WRITTEN or key in free:  # the images are the same
            continue
        if saved.get(key) != now.get(key) and (key != epochs or (now[key] or 0) < _epochs(saved)):
            raise UserError(
                f"{folder} holds a run with {key}={saved.get(key)}, and {now.get(key)} was asked for; a run is "
                f"continued as it was begun, only {epochs} may grow: choose another hydra.run.dir, or "
                f"type resume={folder}."
            )
    return grows


def _epochs(config: Mapping[str, Any]) -> float:
    """Return the number of epochs of a flat config; 0 if it is not limited, infinity if it is not a number."""
    epochs = config.get("trainer.max_epochs") or 0
    return epochs if isinstance(epochs, int) else math.inf


def require_room(module: Pretraining, folder: Path) -> None:
    """Check that two checkpoints fit on the disk, since a new one is written beside the old one.

    Raises:
        UserError: they do not fit, or the folder cannot be written.
    """
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno not in FULL:
            raise UserError(f"{folder} cannot be written ({error.strerror}); choose another hydra.run.dir.") from None
    state = [t for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    moments = [p for p in module.parameters() if p.requires_grad] * 2
    needed = sum(t.numel() * t.element_size() for t in [*state, *moments])
    free, largest = shutil.disk_usage(folder).free, resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if free < 2 * needed:
        raise UserError(
            f"The disk of {folder} is full: checkpoints need {2 * needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are "
            "free; make room or choose another hydra.run.dir."
        )
    if largest != resource.RLIM_INFINITY and largest < needed:
        raise UserError(
            f"A checkpoint needs {needed / 1e6:.1f} MB, and files may have {largest / 1e6:.1f} MB (ulimit -f); raise "
            "the limit."
        )


def resume_point(settings: Settings, pieces: Pieces, folder: RunFolder, console: Console) -> int | None:
    """Return the optimiser step to continue from and print it; None for a fresh start.

    Raises:
        UserError: the checkpoint does not belong to the config, or has no state of the optimiser.
    """
    if not (folder.begun and folder.checkpoint.exists()):
        return None
    checkpoint = read_checkpoint(folder.checkpoint)
    require_same_data(pieces.dataset, folder)
    if shapes(checkpoint["state_dict"]) != shapes(pieces.module.state_dict()):
        raise UserError(
            f"{folder.checkpoint} belongs to another config than {folder.config}; put back the one that it was "
            "trained with, or begin a new run."
        )
    if "optimizer_states" not in checkpoint:
        raise UserError(
            f"{folder.checkpoint} holds no state of the optimiser, so training cannot go on from it; put the run's own "
            "checkpoint back, or begin a new run with backbone.weights."
        )
    step = int(checkpoint["global_step"])
    console.print(f"Continuing {folder} from step {step}.")
    before, now = folder.saved_config()["trainer"]["max_epochs"], settings.trainer["max_epochs"]
    if before and now and now > before:
        steps, batch = int(pieces.derived["steps_per_epoch"]), int(pieces.derived["global_batch"])
        rate = pieces.module.optimization.learning_rate
        old, new = (rate(step, batch, steps * epochs, steps) for epochs in (before, now))
        if old is not None and new is not None:
            name = settings.schedule["_target_"].rpartition(".")[2]
            console.print(
                f"{before} epochs become {now}: the schedule ({name}) ends at epoch {now} now, so the learning rate at "
                f"this step is {new:.3g} instead of {old:.3g}."
            )
    return step


def require_same_data(dataset: Dataset, folder: RunFolder) -> None:
    """Check that the training data are those that the run was begun with.

    Raises:
        UserError: the number of images, the classes or the labels have changed.
    """
    before = folder.facts().get("data")
    now = dataset.trained_on()
    if before in (None, now):
        return
    then, there = (f"{data['images']} training images of {len(data['classes'])} classes" for data in (before, now))
    what = "images in place" if before["labels"] == now["labels"] and before["classes"] == now["classes"] else "labels"
    changed = f"with {then}, and there are {there} now" if then != there else f"with other {what} of its {there}"
    raise UserError(
        f"The data of {folder} changed: the run was begun {changed}; put the images back as they were, or begin a new "
        "run with another hydra.run.dir."
    )


def shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the tensors of a state dict."""
    return {name: value.shape for name, value in state.items() if isinstance(value, torch.Tensor)}


@contextmanager
def closing(loggers: Sequence[Any]) -> Iterator[None]:
    """Close the dashboards with the run's exit code, also after an error."""
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
        for logger in loggers:
            if isinstance(logger, Dashboard):
                logger.close(code)
