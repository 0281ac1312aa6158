"""Run folders, read from disk: no model is loaded and nothing is computed but percentages."""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError

from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder


class Accuracy(BaseModel):
    """Top-1 of one classifier on one split, as fractions, with its 95 % interval over the n images."""

    encoder: str
    classifier: str
    fitted_on: str
    split: str
    top1: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    top5: float | None = None


class Gap(BaseModel):
    """Difference of two accuracies in percentage points, with its 95 % interval over images."""

    encoder: str
    classifier: str
    fitted_on: str
    gap: str
    points: float
    low: float | None = None
    high: float | None = None


class Share(BaseModel):
    """The share of one stratum's map on the object, as a fraction, with its 95 % interval over images.

    `by_place`: what a map that does not see the object would have there; `excess`: the rest, with its interval.
    """

    stratum: str
    share: float
    low: float
    high: float
    by_place: float
    excess: float
    excess_low: float
    excess_high: float


class Difference(BaseModel):
    """How much the strata that differ most on half of the images differ on the other half, with its interval."""

    more: str
    less: str
    points: float
    low: float
    high: float


class Look(BaseModel):
    """Where the strata look, on n images of a split whose objects cover `area` of them on average."""

    split: str
    n: int
    area: float
    shares: list[Share]
    difference: Difference | None = None


class Results(BaseModel):
    """`results.json`. What a page can do without may be missing."""

    model_config = ConfigDict(extra="ignore")

    seed: int
    name: str = "run"
    choices: dict[str, str | None] = {}
    train_on: str | None = None
    classes: list[str] = []
    chance: float | None = None
    derived: dict[str, Any] = {}
    parameters: int | None = None
    wall_time_s: float | None = None
    images_per_second: float | None = None
    peak_memory_mb: float | None = None
    first: dict[str, float | None] = {}
    final: dict[str, float | None] = {}
    accuracies: list[Accuracy] = []
    gaps: list[Gap] = []
    probes: list[dict[str, Any]] = []
    per_class: list[dict[str, Any]] = []
    health: list[dict[str, Any]] = []
    corruptions: list[dict[str, Any]] = []
    shape: list[dict[str, Any]] = []
    decodability: list[dict[str, Any]] = []
    textures: list[dict[str, Any]] = []
    similarity: list[dict[str, Any]] = []
    labelled: list[dict[str, Any]] = []
    strata: Look | None = None


class Curve(NamedTuple):
    """One logged quantity where it was logged."""

    steps: list[float]
    values: list[float]


class Picture(NamedTuple):
    """One image of `figures/`."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Run:
    """One finished run folder; the rest of its files is read when asked for."""

    path: Path
    results: Results

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read `results.json` of a run folder.

        Raises:
            UserError: the file is missing, or is not a run's, or the folder is of another format.
        """
        file = path / "results.json"
        if file.exists() and RunFolder(path).environment.exists():
            RunFolder(path).require_format()
        try:
            return cls(path, Results.model_validate_json(file.read_bytes()))
        except FileNotFoundError:
            raise UserError(
                f"{path} has no results.json: the run failed or has not ended; give the folder of a finished run"
            ) from None
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
            raise UserError(
                f"{file} cannot be read ({where}: {error.errors()[0]['msg']}); "
                "repeat the run or remove it from the folders given"
            ) from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed config, interpolations left as written."""
        file = self.path / "config.yaml"
        content = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else {}
        return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Command, commit, versions, hardware."""
        return _json(self.path / "environment.json")

    @cached_property
    def encoder(self) -> dict[str, Any]:
        """How the exported encoder is loaded."""
        return _json(self.path / "encoder.json")

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The run's `metrics.csv`."""
        return read_curves(self.path / "metrics.csv")

    @cached_property
    def pictures(self) -> list[Picture]:
        """PNGs of `figures/`, those with a caption first and in the captions' order."""
        folder = self.path / "figures"
        captions = _json(folder / "captions.json")
        names = [*captions, *sorted(file.name for file in folder.glob("*.png") if file.name not in captions)]
        return [Picture(folder / name, captions.get(name, "")) for name in names if (folder / name).exists()]


def read_curves(file: Path) -> dict[str, Curve]:
    """Columns of a `metrics.csv` without their empty cells, by step; none where there is no file."""
    curves: dict[str, Curve] = {}
    if file.exists():
        with file.open(newline="") as rows:
            for i, row in enumerate(csv.DictReader(rows)):
                step = float(row.get("step") or i)
                for name, cell in row.items():
                    if name in ("epoch", "step") or not cell or not math.isfinite(value := float(cell)):
                        continue
                    curve = curves.setdefault(name, Curve([], []))
                    curve.steps.append(step)
                    curve.values.append(value)
    return curves


class Failed(NamedTuple):
    """A run folder without usable results."""

    path: Path
    reason: str


def is_run(path: Path) -> bool:
    """Whether the folder is that of a run, finished or not."""
    return (path / "results.json").exists() or (path / "config.yaml").exists()


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Failed]]:
    """All runs in the folders given, at any depth, each once.

    Raises:
        UserError: a path does not exist, or no run is inside any.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; give a run folder or a folder of runs, such as runs/")
        folders |= dict.fromkeys(_run_folders(path.resolve()))
    if not folders:
        raise UserError(
            f"no run inside {', '.join(map(str, paths))}: a run folder holds results.json and config.yaml; "
            "make one with `python -m icl_msr.run`"
        )
    runs, failed = [], []
    for folder in folders:
        if not (folder / "results.json").exists():
            failed.append(Failed(folder, "no results.json: the run failed or has not ended"))
            continue
        try:
            runs.append(Run.load(folder))
        except UserError as error:
            failed.append(Failed(folder, str(error)))
    return runs, failed


def _run_folders(path: Path) -> Iterator[Path]:
    """Run folders are not searched further: what lies in them (loggers' copies of the config) is no run."""
    for folder, inner, _ in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if is_run(Path(folder)):
            inner.clear()
            yield Path(folder)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text()) if file.exists() else {}
    return content if isinstance(content, dict) else {}
