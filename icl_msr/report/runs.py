"""Run folders read from disk, without loading a model."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from icl_msr.core.errors import UserError
from icl_msr.core.figures import Overlays
from icl_msr.core.folder import RunFolder
from icl_msr.core.records import TRAINED, UNTRAINED, Measurement, Outcome
from icl_msr.core.saved import read
from icl_msr.core.storage import read_arrays, read_json, readable

WITHOUT = "restore it from a copy, or remove it, and the report does without"
"""Advice to the user if a file that a report can do without is damaged."""
GAIN = "gain"
"""A name in place of an encoder, for the trained one minus the untrained one."""


class Curve(NamedTuple):
    """The values of a logged quantity, and the steps at which it was logged."""

    steps: list[float]
    values: list[float]


class Picture(NamedTuple):
    """An image in `figures/`, with its caption."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Run:
    """A finished run folder. Files other than `results.json` are read on demand."""

    path: Path
    outcome: Outcome

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read `results.json` of a run folder.

        Raises:
            UserError: the file is missing or damaged, or the folder has another format.
        """
        folder = RunFolder(path)
        folder.require_inside()
        if folder.done and folder.environment.exists():
            folder.require_format()
        return cls(path, Outcome.load(path))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed config, with interpolations as they were written."""
        folder = RunFolder(self.path)
        return read(folder.config) if folder.begun else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Command, commit, versions and hardware."""
        return RunFolder(self.path).facts()

    @cached_property
    def encoder(self) -> dict[str, Any]:
        """The content of `encoder.json`, with the code that loads the encoder."""
        return _optional(self.path / "encoder.json")

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The curves in `metrics.csv`, by name."""
        return read_curves(self.path)

    @cached_property
    def numbers(self) -> dict[Measurement, float]:
        """The findings for display, by `Measurement.identity`, and the gain of the trained encoder for each."""
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
        """The PNG files directly in `figures/`. Those with a caption come first, in the order of the captions."""
        folder = self.path / "figures"
        captions = _optional(folder / "captions.json")
        there = {file.name: file for file in sorted(folder.glob("*.png")) if file.is_file() and not file.is_symlink()}
        names = [*(name for name in captions if name in there), *(name for name in there if name not in captions)]
        pictures = [Picture(there[name], str(captions.get(name, ""))) for name in names]
        return [picture for picture in pictures if picture.file.read_bytes().startswith(b"\x89PNG")]

    @cached_property
    def overlays(self) -> Overlays | None:
        """Maps of the encoders over test images; None if there are none."""
        with suppress(FileNotFoundError), readable(self.path / Overlays.FILE, WITHOUT):
            return Overlays.load(self.path)
        return None

    def require_whole(self) -> None:
        """Read the files that a table over several runs needs.

        Raises:
            UserError: one of them is damaged.
        """
        _ = self.config, self.environment, self.curves, self.overlays
        file = self.path / "predictions.npz"
        with suppress(FileNotFoundError), readable(file, WITHOUT):
            read_arrays(file)


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the columns of `metrics.csv` of a run folder as curves; none if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    curves: dict[str, Curve] = {}
    for i, row in enumerate(RunFolder(folder).logged()):
        step = float(row.get("step", i))
        for name, cell in row.items():
            if name in ("epoch", "step") or not math.isfinite(value := float(cell)):
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
    """Return whether a folder is a run folder, finished or not."""
    return (path / "results.json").exists() or (path / "config.yaml").exists()


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Failed]]:
    """Find all runs in the given folders, at any depth, each once; return finished and failed ones.

    Raises:
        UserError: a path does not exist, or the folders hold no run.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"There is no folder {path}; give a run folder or a folder of runs, such as runs.")
        folders |= dict.fromkeys(_run_folders(path.resolve()))
    if not folders:
        raise UserError(
            f"There is no run in {', '.join(map(str, paths))}: a run folder holds results.json and config.yaml; "
            "make one with python -m icl_msr.run."
        )
    runs, failed = [], []
    for folder in folders:
        if not (folder / "results.json").exists():
            failed.append(Failed(folder, "no results.json: the run failed or has not ended"))
            continue
        try:
            run = Run.load(folder)
            run.require_whole()
            runs.append(run)
        except UserError as error:
            failed.append(Failed(folder, str(error)))
    return runs, failed


def _run_folders(path: Path) -> Iterator[Path]:
    """Yield the run folders under a path. They are not searched further, because loggers copy the config into them."""
    for folder, inner, _ in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if is_run(Path(folder)):
            inner.clear()
            yield Path(folder)


def _optional(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; an empty one if there is no such file."""
    try:
        return read_json(file, WITHOUT)
    except FileNotFoundError:
        return {}
