"""Evaluate any encoder on any data set, in this process or in one process per device."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from icl_msr.cli.conclude import conclude, image_facts, provenance
from icl_msr.cli.order import Order
from icl_msr.cli.processes import require_processes, run_ranks
from icl_msr.core.config import build_as
from icl_msr.core.distributed import join, leave
from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import is_first, is_rank
from icl_msr.core.records import TRAINED, Outcome
from icl_msr.core.saved import as_yaml
from icl_msr.core.signals import stoppable
from icl_msr.core.storage import atomic_write
from icl_msr.core.terminal import plain_console
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.cache import FeatureCache, encoder_identity
from icl_msr.evaluation.pictures import Scene
from icl_msr.evaluation.suite import Evaluation, Measures, Results
from icl_msr.models import foreign
from icl_msr.models.backbones import Backbone
from icl_msr.training.hardware import Hardware, Plan

HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def carry_out(order: Order, words: Sequence[str]) -> int:
    """Evaluate in this process or in one process per device, and return the exit code.

    Raises:
        UserError: the processes cannot be started; see also `evaluate`.
    """
    plan = build_as(Hardware, order.settings.hardware).plan()
    require_processes(plan)
    if plan.world_size == 1:
        evaluate(order, words, plan)
        return 0
    if not is_rank():
        require_writable(order.to)
        order.to.mkdir(parents=True, exist_ok=True)
        given = [word for word in words if not word.startswith("to=")]
        return run_ranks(plan.world_size, [*given, f"to={order.to}"], order.to, "icl_msr.evaluate")
    join(plan.accelerator == "gpu")
    try:
        evaluate(order, words, plan)
    finally:
        leave()
    return 0


def evaluate(order: Order, words: Sequence[str], plan: Plan) -> None:
    """Measure the encoder, write the results and print them.

    Ranks divide the computation of features. The first rank writes and prints.

    Raises:
        UserError: the data, the encoder and the evaluations do not fit together, or a file cannot be read or written.
    """
    # A pipe or a log file has no width, and the tables of several evaluations are wide.
    width = None if sys.stdout.isatty() else 160
    console = plain_console(quiet=not is_first(), width=width)
    began = time.perf_counter()
    subject, settings = order.subject, order.settings
    require_writable(order.to)
    evaluations = [build_as(Measures, node) for node in settings.evaluation.values()]  # type: ignore[type-abstract]
    extractor = FeatureCache(order.cache, HALF.get(plan.precision))
    dataset = build_as(Dataset, settings.dataset)
    dataset = dataset.evaluated
    for evaluation in evaluations:
        evaluation.names(dataset)
    encoder = subject.fitting(dataset.image_size, settings.seed)
    for evaluation in evaluations:
        if isinstance(evaluation, Evaluation):
            evaluation.require(encoder)
    # The images are normalised as in the encoder's training, not by the data set's own statistics.
    dataset = replace(dataset, mean=_triple(subject.mean), std=_triple(subject.std))
    untrained = None if subject.random else foreign.untrained_copy(encoder, settings.seed)
    console.print(Text.assemble((subject.name, "bold"), f" on {dataset.name}, {plan}"))
    if subject.image_size not in (None, dataset.image_size):
        console.print(
            f"It is made for {subject.image_size} pixels and is shown {dataset.image_size} (dataset.image_size).",
            style="yellow",
        )
    results = Results()
    for evaluation in evaluations:
        found = evaluation(
            encoder,
            dataset,
            device=plan.device,
            seed=settings.seed,
            untrained_encoder=untrained,
            extractor=extractor,
        )
        results.join(found)
    if not is_first():
        return
    try:
        write(order, words, plan, dataset, encoder, results, time.perf_counter() - began, console)
    except OSError as error:
        raise UserError(f"{order.to} cannot be written ({error.strerror}); give another folder, to=FOLDER.") from error


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def require_writable(folder: Path) -> None:
    """Check that results can be written to the folder, before anything is measured. Leave nothing behind.

    Raises:
        UserError: the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".try").touch()
        (folder / ".try").unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another folder, to=FOLDER.") from None
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def write(
    order: Order,
    words: Sequence[str],
    plan: Plan,
    dataset: Dataset,
    encoder: Backbone,
    results: Results,
    seconds: float,
    console: Console,
) -> None:
    """Write the files of an evaluation and conclude it as a run is concluded."""
    subject, settings = order.subject, order.settings
    folder = RunFolder(order.to)
    folder.path.mkdir(parents=True, exist_ok=True)
    choices = labels(order, dataset)
    trained = subject.recorded or {"encoder": subject.source}
    about = {
        "name": f"{subject.name} on {dataset.name}",
        "command": " ".join(["python -m icl_msr.evaluate", *words]),
        "encoder": {"source": subject.source, "identity": encoder_identity(encoder), "python": encoder.load},
        "images": image_facts(dataset),
        "choices": choices,
        **provenance(plan),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder.write_facts(about)
    results.save(folder.path)
    atomic_write(folder.config, as_yaml(OmegaConf.create(_config(order, trained))))
    outcome = Outcome(
        name=about["name"],
        choices=choices,
        seed=int(trained.get("seed", settings.seed)),
        evaluation_seed=settings.seed,
        encoder=subject.source,
        train_on=(subject.config or {}).get("dataset", {}).get("train_on", "full"),
        classes=list(dataset.classes),
        chance=dataset.chance,
        parameters=sum(p.numel() for p in encoder.parameters()),
        wall_time_s=seconds,
        records=results.records,
    )
    scene = Scene(dataset, results.features.get(TRAINED, {}), overlays=results.overlays)
    with stoppable(folder.farewell_of_evaluation):
        conclude(folder, outcome, scene, [], console)


def _config(order: Order, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the encoder's run with the data set and the evaluations of this command."""
    subject, settings = order.subject, order.settings
    config = {**trained, "dataset": settings.dataset, "evaluation": settings.evaluation}
    config |= {"checkpoint": subject.checkpoint} if subject.checkpoint else {}
    if subject.config is None:
        config["seed"] = settings.seed
    elif settings.seed != trained.get("seed"):
        config["evaluation_seed"] = settings.seed
    return config


def labels(order: Order, dataset: Dataset) -> dict[str, str]:
    """Return the labels that tell this evaluation from others in a table.

    They are the choices of the run that trained the encoder, the data set that it was measured on, and the evaluation.
    A data set without a name of its own is called by the name of its folder.
    """
    subject = order.subject
    choices = {"encoder": subject.name} if subject.config is None else dict(subject.choices or {})
    measured_on = order.choices["dataset"]
    if not order.own_data and measured_on in ("imagefolder", "arrays", "wilds"):
        measured_on = f"{measured_on} {dataset.name}"
    if subject.config is not None and not order.own_data:
        choices["pretrained_on"] = choices.get("dataset", "")
    return {**choices, **order.choices, "dataset": measured_on}
