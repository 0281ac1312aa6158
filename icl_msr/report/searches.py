"""The best trials of a sweep whose jobs a sweeper has chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icl_msr.core.errors import UserError
from icl_msr.core.folder import SEARCHED
from icl_msr.core.records import fit
from icl_msr.core.saved import read
from icl_msr.core.storage import readable
from icl_msr.report.runs import WITHOUT, Failed


@dataclass(frozen=True)
class Trial:
    """A trial that no other one is better than."""

    folder: str
    """The folder of its run."""
    params: Mapping[str, Any]
    """What the sweeper has chosen, by key."""
    values: Mapping[str, float]
    """The objectives by name."""

    def __str__(self) -> str:
        return f"{self.reached} in {self.folder} with {self.chosen}"

    @property
    def reached(self) -> str:
        """The objectives in words."""
        return ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())

    @property
    def chosen(self) -> str:
        """The words that choose it."""
        return " ".join(f"{key}={value}" for key, value in self.params.items())


def best_trials(folders: Iterable[Path]) -> tuple[list[Trial], list[Failed]]:
    """Read the best trials of the searches in some folders, each once, and the files that are damaged."""
    trials: list[Trial] = []
    failed = []
    for file in dict.fromkeys(folder.resolve() / SEARCHED for folder in folders):
        if not file.exists():
            continue
        try:
            with readable(file, WITHOUT):
                found: list[Trial] = fit(read(file).get("solutions", []), list[Trial], "solutions")
        except UserError as error:
            failed.append(Failed(file, str(error)))
            continue
        trials += [
            replace(trial, folder=str(file.parent / Path(trial.folder).name)) for trial in found
        ]  # may have moved
    return trials, failed
