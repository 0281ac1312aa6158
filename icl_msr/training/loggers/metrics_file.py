"""The CSV file of a run's logged numbers."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from icl_msr.core.folder import RunFolder
from icl_msr.core.ranks import is_first
from icl_msr.core.storage import atomic_write
from icl_msr.core.tables import csv_text, inert
from icl_msr.training.loggers.base import About


class MetricsFile(Logger):
    """Writes `metrics.csv`: one row per call of `log_metrics`, on the disk at once.

    A continued run keeps the rows of the steps before its checkpoint. Lightning's own CSV logger would delete the file
    then, and rewrites it in place for a new column.
    """

    def __init__(self, folder: Path, about: About):
        super().__init__()
        self.file = folder / "metrics.csv"
        self.columns: list[str] = ["epoch", "step"]
        if is_first():
            done = about.resumed_at or 0
            self._write([row for row in self._rows() if "step" in row and float(row["step"]) < done])

    @override
    @property
    def name(self) -> str:
        return ""

    @override
    @property
    def version(self) -> str:
        return ""

    @override
    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        # `config.yaml` has them.
        pass

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # One row.
        row = {**{inert(name): value for name, value in metrics.items()}, "step": step}
        if row.keys() - set(self.columns):
            self.columns = ["epoch", "step", *sorted({*self.columns, *row} - {"epoch", "step"})]
            self._write(self._rows())
        with self.file.open("a", newline="") as file:
            file.write(self._text([row]))

    def _rows(self) -> list[dict[str, str]]:
        return RunFolder(self.file.parent).logged()

    def _write(self, rows: list[dict[str, str]]) -> None:
        filled = {name for row in rows for name in row}
        self.columns = ["epoch", "step", *sorted(({*self.columns, *filled}) - {"epoch", "step"})]
        atomic_write(self.file, csv_text([self.columns]) + self._text(rows))

    def _text(self, rows: Any) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, extrasaction="ignore", lineterminator="\n").writerows(rows)
        return text.getvalue()
