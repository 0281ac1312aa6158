"""The end of a run and of an evaluation: facts, results, pictures, report, dashboards and the printed answer."""

import platform
import resource
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from icl_msr import __version__
from icl_msr.cli.assemble import Pieces
from icl_msr.cli.sweeps import job_type, run_name, short_name, sweep_group
from icl_msr.core.config import Settings, fingerprint
from icl_msr.core.errors import UserError, reason
from icl_msr.core.folder import RunFolder
from icl_msr.core.records import ACCURACY, TRAINED, Outcome
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.pictures import Scene, draw
from icl_msr.evaluation.strata_maps import look_at_strata
from icl_msr.evaluation.suite import Evaluation, Results
from icl_msr.models.exported import export_encoder
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.report import tables, write_report
from icl_msr.report.runs import Run
from icl_msr.report.words import answer, faint_meta_signal
from icl_msr.training.hardware import Plan
from icl_msr.training.loggers import About, Dashboard
from icl_msr.training.pictures import make_scene


def describe(settings: Settings, plan: Plan, dataset: Dataset, folder: RunFolder) -> dict[str, Any]:
    """Return the facts that a run's numbers depend on.

    A continued run keeps the facts of its start and adds those of the continuation.
    """
    now = {
        "command": "python -m icl_msr.run " + " ".join(HydraConfig.get().overrides.task),
        "config_hash": fingerprint(settings),
        **provenance(plan),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if folder.begun and (begun := folder.facts()):
        return {**begun, "continued": [*begun.get("continued", []), now]}
    chosen = HydraConfig.get().runtime.choices  # has no groups with several choices, and no typed nodes
    choices = {
        group: str(chosen[group]) if group in chosen else _named(node) for group, node in settings.groups().items()
    }
    typed = HydraConfig.get().overrides.task
    return {
        "name": short_name(choices),
        "run_name": run_name(choices, typed, settings.seed),
        "group": sweep_group(),
        "job_type": job_type(typed),
        **now,
        "choices": choices,
        "images": image_facts(dataset),
        "data": dataset.trained_on(),
    }


def about(settings: Settings, plan: Plan, pieces: Pieces, facts: Mapping[str, Any], resumed_at: int | None) -> About:
    """Return what dashboards show of a run: the config, and facts that a user compares runs by."""
    method = list(pieces.module.method.parameters())
    derived = {
        **pieces.derived,
        "ranks": plan.world_size,
        "batch_per_rank": settings.loader.batch_size // plan.world_size,
        "parameters": sum(p.numel() for p in pieces.module.method.backbone.parameters()),
        "trained_parameters": sum(p.numel() for p in method if p.requires_grad),
    }
    others = ("name", "run_name", "group", "job_type", "choices", "images", "data", "continued")
    environment = {key: value for key, value in facts.items() if key not in others}
    data = {"name": pieces.dataset.name, **facts.get("data", {}), "classes": len(pieces.dataset.classes)}
    known = {"choices": facts["choices"], "derived": derived, "environment": environment, "data": data}
    return About(
        name=facts.get("run_name") or facts["name"],
        group=facts["group"],
        job_type=facts["job_type"],
        config=settings.model_dump() | known,
        resumed_at=resumed_at,
    )


def _named(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2] if "_target_" in node else "+".join(node)


def evaluate(settings: Settings, plan: Plan, pieces: Pieces, folder: RunFolder, choices: Mapping[str, str]) -> Results:
    """Export the encoder of a run and evaluate it. Write the arrays that are too long for `results.json`."""
    backbone, dataset = pieces.module.method.backbone, pieces.dataset
    export_encoder(backbone, folder.path, {**image_facts(dataset), "choices": choices, "icl_msr": __version__})
    results = Results()
    for evaluation in pieces.evaluations:
        found = evaluation(
            backbone, dataset.evaluated, device=plan.device, seed=settings.seed, untrained_encoder=pieces.untrained
        )
        results.join(found)
    if pieces.evaluations:
        results.save(folder.path)
    regularizer = pieces.module.regularizer
    usual = next((one for one in pieces.evaluations if isinstance(one, Evaluation)), None)  # it sets the bootstrap
    if isinstance(regularizer, MetaSemanticRegularizer) and usual is not None and pieces.without_maps is None:
        strata = look_at_strata(
            pieces.module.to(plan.device).method.backbone,
            regularizer.strata,
            dataset.evaluated,
            device=plan.device,
            batch_size=usual.batch_size,
            bootstrap=Bootstrap(usual.bootstrap, settings.seed),
        )
        results.records.join(strata)
    return results


def scene_of(pieces: Pieces, plan: Plan, results: Results) -> Scene:
    """Return the input of a run's pictures."""
    module = pieces.module.to(plan.device)
    scene = make_scene(
        module,
        pieces.dataset,
        lambda: next(pieces.data.epoch(0, module.device)),
        features=results.features.get(TRAINED, {}),
        maps=pieces.without_maps is None,
    )
    return replace(scene, overlays=results.overlays)


def conclude(
    folder: RunFolder, outcome: Outcome, scene: Scene, dashboards: Sequence[Dashboard], console: Console
) -> None:
    """Write `results.json`, draw the pictures, write the report and print the answer.

    A picture or report that fails is named on the terminal and does not stop the others.

    Raises:
        UserError: the disk is full.
    """
    folder.write(folder.results.name, outcome.to_json())
    missing = draw(scene, folder.path / "figures")
    report = folder.path / "report.html"
    with sparing("report.html", missing):
        write_report(folder.path)
    for dashboard in dashboards:
        with sparing(type(dashboard).__name__, missing):
            dashboard.conclude(folder.path)
    with sparing("the tables", missing):
        run = Run.load(folder.path)
        if outcome.records.measurements:
            for table in tables(outcome):
                if not table.folded:
                    console.print(table.rich())
            if outcome.records.where(ACCURACY.kind):
                console.print("\n" + " ".join(answer(outcome)))
        if warning := faint_meta_signal(run.curves, run.config.get("regularizer") or {}):
            console.print(warning, style="yellow")
    if missing:
        console.print(f"The results are complete, but {'; '.join(missing)} could not be made.", style="yellow")
    console.print(f"results  {folder.results}\nreport   {report}")


@contextmanager
def sparing(name: str, missing: list[str]) -> Iterator[None]:
    """Catch an error of the block and append `name` and the reason to `missing`. A `UserError` is raised again."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        missing.append(f"{name} ({reason(error)})")


def image_facts(dataset: Dataset) -> dict[str, Any]:
    """Return the image size and normalisation that an encoder of this data set expects."""
    return {"image_size": dataset.image_size, "mean": dataset.mean, "std": dataset.std, "dataset": dataset.name}


def provenance(plan: Plan) -> dict[str, Any]:
    """Return the code, the package versions and the hardware of this process."""
    checkout = Path(__file__).parents[2] / ".git"  # an installed package may lie in another repository
    git = ["git", "--git-dir", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "icl_msr": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a subclass of str otherwise
        "torchvision": version("torchvision"),
        "lightning": version("pytorch_lightning"),
        "hardware": str(plan),
    }


def peak_memory_mb(plan: Plan) -> float:
    """Return the peak memory of the training device so far, in MB. On a CPU it is the peak of the process."""
    if plan.accelerator == "gpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
