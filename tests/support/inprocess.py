"""Run the program in this process. It is faster than a new process, and tests can read the log and the output."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from omegaconf import DictConfig

from icl_msr.cli.command import Job, main
from icl_msr.cli.job import run
from icl_msr.core.config import Settings
from support.tiny import DATA, MODEL

WORDS = [*DATA, *MODEL, "negatives=patch", "evaluation=light", "logger=csv"]
TRAINER = ["trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]


class Answer(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


@contextmanager
def loggers_put_back() -> Iterator[None]:
    """Restore the root logger at the end. Hydra adds handlers of the run to it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        for handler in [h for h in logging.root.handlers if h not in handlers]:
            handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def execute(*words: str, job: Job = run) -> Answer:
    """Run `python -m icl_msr.run <words>` in this process."""
    as_typed = patch.object(sys, "argv", ["icl_msr.run"])
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, loggers_put_back(), as_typed:
        try:
            code = main(job, words)
        except SystemExit as end:
            code = int(end.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


@dataclass
class Finished:
    """A run that ended as expected: its folder, its return value and its output."""

    folder: Path
    values: list[float]
    printed: str
    complaints: str

    def json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name).read_text())
        return content


def finish(folder: Path, *words: str, code: int = 0) -> Finished:
    """Train for two epochs of three batches below `folder`, and check that the exit code is `code`."""
    values: list[float] = []

    def job(settings: Settings, config: DictConfig) -> float:
        values.append(run(settings, config))
        return values[-1]

    folders = [f"hydra.run.dir={folder}/run", f"hydra.sweep.dir={folder}/sweep"]
    answer = execute(*WORDS, *TRAINER, *folders, *words, job=job)
    assert answer.code == code, answer.err
    return Finished(folder / ("sweep" if "-m" in words else "run"), values, answer.out, answer.err)
