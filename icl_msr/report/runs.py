"""Run folders, read from disk: no model is loaded and nothing is computed."""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from icl_msr.core.errors import UserError
from icl_msr.core.folder import RunFolder
from icl_msr.core.records import TRAINED, UNTRAINED, Measurement, Outcome

GAIN = "gain"
"""In place of an encoder: the trained one minus the untrained one."""


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
    outcome: Outcome

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read `results.json` of a run folder.

        Raises:
            UserError: the file is missing, or is not a run's, or the folder is of another format.
        """
        folder = RunFolder(path)
        if folder.done and folder.environment.exists():
            folder.require_format()
        return cls(path, Outcome.load(path))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed config, interpolations left as written."""
        from omegaconf import OmegaConf

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
    def numbers(self) -> dict[Measurement, float]:
        """The findings by the record without its number, as people read them, and what training added to each."""
        found = {record.identity: record.shown for record in self.outcome.records.findings()}
        known = {record: value for record, value in found.items() if value is not None and math.isfinite(value)}
        untrained = {replace(record, encoder=TRAINED): known[record] for record in known if record.encoder == UNTRAINED}
        gains = {
            replace(record, encoder=GAIN): value - untrained[record]
            for record, value in known.items()
            if record in untrained
        }
        return known | gains

    @cached_property
    def pictures(self) -> list[Picture]:
        """The PNGs that lie in `figures/` itself, those with a caption first and in the captions' order."""
        folder = self.path / "figures"
        captions = _json(folder / "captions.json")
        there = {file.name: file for file in sorted(folder.glob("*.png")) if file.is_file() and not file.is_symlink()}
        names = [*(name for name in captions if name in there), *(name for name in there if name not in captions)]
        pictures = [Picture(there[name], str(captions.get(name, ""))) for name in names]
        return [picture for picture in pictures if picture.file.read_bytes().startswith(b"\x89PNG")]


def read_curves(file: Path) -> dict[str, Curve]:
    """Read the columns of a `metrics.csv` without their empty cells, by step; none where there is no file."""
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
    """Find all runs in the folders given, at any depth, each once.

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
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):  # a page can do without
        return {}
    return content if isinstance(content, dict) else {}
