"""How a run ends: evaluation, pictures, facts, results, report."""

import json
import math
import platform
import resource
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from icl_msr import __version__
from icl_msr.cli.assemble import Pieces
from icl_msr.cli.sweeps import job_type, sweep_group
from icl_msr.core.config import Settings, fingerprint
from icl_msr.core.folder import RunFolder
from icl_msr.core.storage import atomic_write
from icl_msr.data.dataset import Dataset
from icl_msr.evaluation import pictures
from icl_msr.evaluation.metrics import Bootstrap
from icl_msr.evaluation.strata_maps import Look, look, measure, split_with_masks
from icl_msr.evaluation.suite import Evaluation, Results
from icl_msr.models.backbones import Backbone
from icl_msr.models.exported import export_encoder
from icl_msr.regularizers import MetaSemanticRegularizer
from icl_msr.training.datamodule import DataModule
from icl_msr.training.hardware import Plan
from icl_msr.training.module import Pretraining


def evaluate(settings: Settings, plan: Plan, pieces: Pieces, folder: RunFolder, choices: Mapping[str, str]) -> Results:
    """Exports the encoder, measures it, and draws the pictures of the report."""
    backbone, dataset = pieces.module.method.backbone, pieces.dataset
    assert isinstance(backbone, Backbone)
    export_encoder(backbone, folder.path, {**image_facts(dataset), "choices": choices, "icl_msr": __version__})
    results = Results()
    for evaluation in pieces.evaluations:
        found = evaluation(
            backbone, dataset.evaluated, device=plan.device, seed=settings.seed, untrained_encoder=pieces.untrained
        )
        results.add(found)
    if pieces.evaluations:
        results.save(folder.path)
    draw(folder.path / "figures", pieces.data, pieces.module.to(plan.device), results)
    return results


def looks(settings: Settings, plan: Plan, pieces: Pieces) -> Look | None:
    """What the strata look at; None without strata, evaluation, or a test split that knows where its objects are."""
    dataset, backbone, regularizer = pieces.dataset.evaluated, pieces.module.method.backbone, pieces.module.regularizer
    split = split_with_masks(dataset)
    if not isinstance(regularizer, MetaSemanticRegularizer) or split is None or not isinstance(backbone, Backbone):
        return None
    evaluation = next((one for one in pieces.evaluations if isinstance(one, Evaluation)), None)
    if evaluation is None:  # or none with a bootstrap
        return None
    found = measure(
        backbone,
        regularizer.strata,
        dataset.tests[split],
        mean=dataset.mean,
        std=dataset.std,
        device=plan.device,
        images=1000,
        batch_size=evaluation.batch_size,
    )
    return look(found, split, Bootstrap(evaluation.bootstrap, settings.seed))


def draw(folder: Path, data: DataModule, module: Pretraining, results: Results) -> None:
    """The grids of the report."""
    folder.mkdir(exist_ok=True)
    dataset, method, regularizer = data.dataset, module.method, module.regularizer
    views = next(data.epoch(0, module.device))
    captions = {"views.png": pictures.views_grid(views, dataset.mean, dataset.std, folder / "views.png")}
    if views.negatives is not None:
        captions["negatives.png"] = pictures.negatives_grid(views, dataset.mean, dataset.std, folder / "negatives.png")
    if isinstance(regularizer, MetaSemanticRegularizer) and isinstance(method.backbone, Backbone):
        with torch.no_grad():
            strata = regularizer.strata(views.images)
        captions["strata.png"] = pictures.strata_grid(
            method.backbone, strata[:10], views.images[:10], dataset.mean, dataset.std, folder / "strata.png"
        )
        captions["weights.png"] = pictures.weights_figure(strata, folder / "weights.png")
    if results.features:
        captions |= pictures.feature_pictures(dataset.evaluated, results.features["trained"], folder)
    atomic_write(folder / "captions.json", json.dumps(captions, indent=2))


def image_facts(dataset: Dataset) -> dict[str, Any]:
    """What an encoder of this data set must be fed with."""
    return {"image_size": dataset.image_size, "mean": dataset.mean, "std": dataset.std, "dataset": dataset.name}


def describe(settings: Settings, plan: Plan, dataset: Dataset, folder: RunFolder) -> dict[str, Any]:
    """Where a number comes from. A run that goes on keeps what it was begun with and adds how it was continued."""
    checkout = Path(__file__).parents[2] / ".git"  # an installed package may lie in somebody else's
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
    chosen = HydraConfig.get().runtime.choices  # a group of several choices, or of a node that was typed, is not in it
    choices = {
        group: str(chosen[group]) if group in chosen else _named(node) for group, node in settings.groups().items()
    }
    name = "-".join(choices[group] for group in ("method", "regularizer", "negatives", "dataset", "backbone"))
    place = {"group": sweep_group(), "job_type": job_type(HydraConfig.get().overrides.task)}
    return {"name": name, **place, **now, "choices": choices, "images": image_facts(dataset)}


def _named(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2] if "_target_" in node else "+".join(node)


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
