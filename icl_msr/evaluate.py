"""`python -m icl_msr.evaluate`: any encoder, ours or foreign, on any data set, with any evaluation.

python -m icl_msr.evaluate run=FOLDER dataset=imagefolder dataset.root=photos evaluation=[default,corruptions]
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from icl_msr import __version__
from icl_msr.checkpoint import load_encoder
from icl_msr.command import sentence
from icl_msr.config import Settings, build, check, config_dir, suggestion
from icl_msr.data.dataset import Dataset
from icl_msr.encoders import Backbone
from icl_msr.errors import UserError
from icl_msr.evaluation import foreign
from icl_msr.evaluation.cache import FeatureCache, encoder_identity
from icl_msr.evaluation.suite import Results
from icl_msr.evaluation.tables import tables
from icl_msr.folder import RunFolder
from icl_msr.hardware import Plan
from icl_msr.report import gap_table, matrix_table, write_report
from icl_msr.report.runs import Run
from icl_msr.report.words import answer

SOURCES = ("run", "checkpoint", "encoder")
OWN = (*SOURCES, "weights", "to", "cache")
COMPOSED = ("dataset", "evaluation", "hardware", "seed")
"""What may be changed of the config that `icl_msr.run` composes."""
CACHE = ".cache/icl-msr/features"

USAGE = """python -m icl_msr.evaluate SOURCE [dataset=...] [evaluation=...] [seed=N] [to=FOLDER]

  run=FOLDER                     a run's encoder, on the run's own data set unless another is given
  checkpoint=FILE                the encoder of one checkpoint in a run's folder
  encoder=FILE.safetensors       an exported encoder, with its .json beside it
  encoder=timm:NAME              a model of timm or
  encoder=torchvision:NAME       torchvision, with its own weights
    weights=null|FILE              or with random ones (see seed), or with those in a file
"""
EPILOG = """dataset=, evaluation= and hardware= name files of conf/ and take their keys, as in python -m icl_msr.run;
evaluation=[default,corruptions] does both. Features are kept in cache=FOLDER (default .cache/icl-msr/features; null:
nowhere). The results go to to=FOLDER (default runs/<date>/<time>-evaluate-<encoder>), where python -m icl_msr.report
finds them beside runs."""


@dataclass
class Subject:
    """What is evaluated, and what is known of it before the data set is."""

    name: str
    source: str
    build: Callable[[int, int], Backbone]
    """The encoder for images of so many pixels; its random weights, if it has any, depend on the seed."""
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int | None = None
    """What it was trained with, in pixels, if known."""
    config: Mapping[str, Any] | None = None
    """That of the run which trained it."""
    choices: Mapping[str, str] | None = None
    """Those of the run."""
    random: bool = False
    """Whether its weights are random, so that there is no untrained one to compare it with."""


@dataclass
class Order:
    """A command, read and checked."""

    subject: Subject
    settings: list[Settings]
    """One for each evaluation; they differ in nothing else."""
    evaluations: list[str]
    choices: dict[str, str]
    """Of the groups `dataset` and `evaluation`."""
    own_data: bool
    """Whether the data set is the run's own."""
    to: Path
    cache: Path | None


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m icl_msr.evaluate",
        usage=USAGE,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures any encoder, ours or foreign, on any data set.",
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as above")
    words: list[str] = parser.parse_args(arguments).words
    try:
        evaluate(read(words), words)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read(words: Sequence[str]) -> Order:
    """What a command line asks for; nothing is built but an encoder that lies in a file.

    Raises:
        UserError: a word is no key, a value is not allowed, or there is no such encoder.
    """
    own: dict[str, str] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        group = key.lstrip("+~").partition(".")[0]
        if not equals:
            raise UserError(f"{word} is no key=value; the encoder is given as run=FOLDER or encoder=timm:NAME.")
        if key in own:
            raise UserError(f"{key} is given twice; keep one.")
        if key in OWN:
            own[key] = value
        elif group in COMPOSED or key == "hydra.searchpath":
            overrides.append(word)
        else:
            known = [*OWN, *COMPOSED]
            raise UserError(f"{key} is not a key of an evaluation; {suggestion(key, known)}")
    sources = [key for key in SOURCES if key in own]
    if len(sources) != 1:
        given = f"{' and '.join(sources)} are given" if sources else "Nothing is given to evaluate"
        raise UserError(f"{given}; give one of run=FOLDER, checkpoint=FILE, encoder=timm:NAME|torchvision:NAME|FILE.")
    if "weights" in own and ":" not in own.get("encoder", ""):
        raise UserError("weights is for encoder=timm:NAME and encoder=torchvision:NAME alone; leave it out.")
    subject = find(sources[0], own[sources[0]], own.get("weights"))
    composed, evaluations, choices, own_data = configs(subject, overrides)
    settings = [check(config) for config in composed]
    stamp = datetime.now().astimezone()
    name = re.sub(r"[^\w.-]+", "-", subject.name)
    default = f"runs/{stamp:%Y-%m-%d}/{stamp:%H-%M-%S}-evaluate-{name}"
    to, cache = Path(own.get("to", default)), own.get("cache", CACHE)
    if (to / "results.json").exists() or (to / "config.yaml").exists():
        raise UserError(f"{to} holds results or a run already; choose another folder, to=FOLDER.")
    return Order(subject, settings, evaluations, choices, own_data, to, None if cache in ("", "null") else Path(cache))


def find(source: str, value: str, weights: str | None) -> Subject:
    """The encoder that is asked for.

    Raises:
        UserError: there is none.
    """
    if source == "encoder" and (named := re.fullmatch(r"(\w+):(.*)", value)):
        library, name = named.groups()
        if library not in foreign.LIBRARIES:
            raise UserError(f"encoder={value} is of an unknown library; {suggestion(library, foreign.LIBRARIES)}")
        foreign.require_known(library, name)
        chosen = None if weights == "null" else weights or library

        def made(image_size: int, seed: int) -> Backbone:
            return foreign.foreign_encoder(library, name, image_size, chosen, seed)

        mean, std = foreign.statistics_of(library, name)
        said = f"{value}, weights={chosen or 'null'}"
        return Subject(f"{library}:{name}", said, made, mean, std, random=chosen is None)
    if source == "encoder":
        if not Path(value).exists():
            raise UserError(f"There is no encoder {value}; give a .safetensors file, timm:NAME or torchvision:NAME.")
        backbone, about = load_encoder(Path(value))
        return _exported(backbone, about, Path(value).stem, value)
    file = Path(value)
    run = RunFolder(file if source == "run" else file.absolute().parent.parent)
    if source == "checkpoint":
        if not file.is_file():
            raise UserError(f"There is no checkpoint {file}; give a run's checkpoints/last.ckpt.")
        run.checkpoint = file
    elif not run.path.is_dir():
        raise UserError(f"There is no run {run}; give the folder of a run.")
    if not run.checkpoint.exists() and run.done:
        backbone, about = load_encoder(run.path)
    else:
        from icl_msr.export import rebuild  # what only a run needs: its method

        backbone, about = rebuild(run, "online")
    subject = _exported(backbone, about, run.path.resolve().name, value)
    subject.config = run.saved_config()
    subject.choices = run.facts()["choices"]
    subject.name = run.facts().get("name", subject.name)
    return subject


def _exported(backbone: Backbone, about: Mapping[str, Any], name: str, source: str) -> Subject:
    try:
        mean, std, size = about["mean"], about["std"], int(about["image_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{source} does not say what images the encoder takes; export it from its run again.") from None
    return Subject(name, source, lambda *_: backbone, mean, std, size, None, about.get("choices"))


def configs(subject: Subject, overrides: Sequence[str]) -> tuple[list[DictConfig], list[str], dict[str, str], bool]:
    """One composed config for each evaluation, their names, the choices of the two groups, and whether the data set is
    that of the run.

    Raises:
        UserError: they cannot be composed.
    """
    picked = {"dataset": "confounded", "evaluation": "default"}
    picked |= {key: value for key, _, value in (word.partition("=") for word in overrides) if key in picked}
    names = re.split(r"\s*,\s*", picked["evaluation"].strip("[] "))
    own_data = subject.config is not None and not any(word.startswith("dataset=") for word in overrides)
    keys = [word for word in overrides if re.match(r"\+*evaluation\.", word)]
    changes = [word for word in overrides if own_data and re.match(r"\+*dataset\.", word)]
    common = [word for word in overrides if word not in [*keys, *changes] and not word.startswith("evaluation=")]
    if subject.config is not None:
        common.insert(0, f"seed={subject.config['seed']}")
    try:
        nodes = {name: _compose([*common, f"evaluation={name}"]).evaluation for name in names}
        composed = []
        for name in names:
            # A key is for those evaluations that have it; one that none has is refused by the last.
            has = {word: [other for other in names if _has(nodes[other], word)] or names[-1:] for word in keys}
            fitting = [word for word in keys if name in has[word]]
            config = _compose([*common, f"evaluation={name}", *fitting])
            if own_data:
                assert subject.config is not None
                config.dataset = OmegaConf.create(subject.config["dataset"])
            for change in OverridesParser.create().parse_overrides(changes):
                OmegaConf.update(config, change.key_or_group, change.value(), force_add=True)
            composed.append(config)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as mistake:
        raise UserError(sentence(mistake, overrides)) from None
    if own_data and subject.choices:
        picked["dataset"] = subject.choices["dataset"]
    return composed, names, {**picked, "evaluation": "+".join(names)}, own_data


def _has(node: DictConfig, word: str) -> bool:
    return word.startswith("+") or word.partition("=")[0].split(".")[1] in node


def _compose(overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def evaluate(order: Order, words: Sequence[str]) -> Path:
    """Measures, writes and prints; returns the folder of the results.

    Raises:
        UserError: the data, the encoder or an evaluation do not fit, or a file cannot be read or written.
    """
    console = Console(highlight=False, soft_wrap=True)
    began = time.perf_counter()
    subject, settings = order.subject, order.settings[0]
    plan: Plan = build(settings.hardware).plan()
    if plan.world_size > 1:
        raise UserError("An evaluation runs on one device; leave hardware=ddp and hardware.devices out.")
    require_writable(order.to)
    evaluations = [build(part.evaluation) for part in order.settings]
    if None in evaluations:
        raise UserError(f"evaluation=none measures nothing; leave it out, or {_others()}")
    extractor = FeatureCache(order.cache)
    dataset = build(settings.dataset)
    if not isinstance(dataset, Dataset):
        raise UserError(f"{settings.dataset['_target_']} gives {type(dataset).__name__}, and a Dataset is needed.")
    for evaluation in evaluations:
        evaluation.names(dataset)
    encoder = subject.build(dataset.image_size, settings.seed).to(memory_format=torch.channels_last).eval()
    require_fit(encoder, subject, dataset)
    # The encoder is fed as it was trained, whatever the data set's own statistics are.
    dataset = replace(dataset, mean=tuple(subject.mean), std=tuple(subject.std))
    untrained = None if subject.random else foreign.untrained_copy(encoder, settings.seed)
    console.print(f"[bold]{subject.name}[/bold] on {dataset.name}, {plan}")
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
        results.add(found)
    return write(order, words, plan, dataset, encoder, results, time.perf_counter() - began, console)


def require_writable(folder: Path) -> None:
    """Before anything is measured; leaves no trace.

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


def require_fit(encoder: Backbone, subject: Subject, dataset: Dataset) -> None:
    """One image goes through.

    Raises:
        UserError: it does not.
    """
    try:
        with torch.inference_mode():
            encoder(torch.zeros(2, 3, dataset.image_size, dataset.image_size))
    except Exception as error:
        trained = f"set dataset.image_size={subject.image_size}" if subject.image_size else "set dataset.image_size"
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{subject.name} cannot take images of {dataset.image_size} pixels ({reason}); {trained}."
        ) from None


def write(
    order: Order,
    words: Sequence[str],
    plan: Plan,
    dataset: Dataset,
    encoder: Backbone,
    results: Results,
    seconds: float,
    console: Console,
) -> Path:
    """The files of a run that an evaluation has, results.json before the report; and the tables on the terminal."""
    subject, settings = order.subject, order.settings[0]
    folder = RunFolder(order.to)
    folder.path.mkdir(parents=True, exist_ok=True)
    choices = labels(order, dataset)
    trained = subject.config or {"encoder": subject.source}
    evaluations = {name: part.evaluation for name, part in zip(order.evaluations, order.settings, strict=True)}
    config = {**trained, "dataset": settings.dataset, "evaluation": evaluations}
    if subject.config is None:
        config["seed"] = settings.seed
    commit = subprocess.run(
        ["git", "--git-dir", str(Path(__file__).parents[1] / ".git"), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    about = {
        "name": f"{subject.name} on {dataset.name}",
        "command": " ".join(["python -m icl_msr.evaluate", *words]),
        "encoder": {"source": subject.source, "identity": encoder_identity(encoder), "python": encoder.load},
        "images": {
            "image_size": dataset.image_size,
            "mean": dataset.mean,
            "std": dataset.std,
            "dataset": dataset.name,
        },
        "choices": choices,
        "commit": commit.stdout.strip() or None,
        "icl_msr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "hardware": str(plan),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder.write(folder.environment.name, about)
    (folder.config).write_text(OmegaConf.to_yaml(OmegaConf.create(json.loads(json.dumps(config)))))
    np.savez_compressed(folder.path / "predictions.npz", **results.predictions)  # type: ignore[arg-type]
    summary = {
        "name": about["name"],
        "choices": choices,
        "seed": int(trained.get("seed", settings.seed)),
        "evaluation_seed": settings.seed,
        "encoder": subject.source,
        "train_on": (subject.config or {}).get("dataset", {}).get("train_on", "full"),
        "classes": list(dataset.classes),
        "chance": dataset.chance,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "wall_time_s": seconds,
        **results.records(),
    }
    folder.write(folder.results.name, summary)
    report = write_report(folder.path)
    saved = Run.load(folder.path).results
    if results.accuracies:
        for part in (matrix_table(saved), gap_table(saved), " ".join(answer(saved))):
            if part is not None:
                console.print(part)
    for table in tables(results):
        console.print(table)
    console.print(f"results  {folder.results}\nreport   {report}")
    return folder.path


def labels(order: Order, dataset: Dataset) -> dict[str, str]:
    """What tells this evaluation from others in a table: the choices of the run that trained the encoder, the data set
    that it was measured on, by the folder's name where the choice is no name of one, and the evaluation.
    """
    subject = order.subject
    choices = {"encoder": subject.name} if subject.config is None else dict(subject.choices or {})
    measured_on = order.choices["dataset"]
    if not order.own_data and measured_on in ("imagefolder", "arrays"):
        measured_on = f"{measured_on} {dataset.name}"
    if subject.config is not None and not order.own_data:
        choices["pretrained_on"] = choices.get("dataset", "")
    return {**choices, **order.choices, "dataset": measured_on}


def _others() -> str:
    return suggestion("", (path.stem for path in (config_dir() / "evaluation").glob("*.yaml") if path.stem != "none"))


if __name__ == "__main__":
    sys.exit(main())
