"""The folder of a run: its files, its format and its lock."""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from icl_msr.core.config import PLURAL, Settings, with_new_keys
from icl_msr.core.errors import UserError
from icl_msr.core.records import Outcome, fit
from icl_msr.core.saved import ADVICE, read, shown
from icl_msr.core.signals import again
from icl_msr.core.storage import atomic_write, read_json, read_table, readable

FORMAT = 2
"""The format of a run folder, written to its environment.json. It grows when the files are read in another way."""

SEARCHED = "optimization_results.yaml"
"""File in which a sweeper leaves the best jobs of a sweep at its end. It has Hydra's name."""

_NAMES = re.compile(r"[\w-]+([+/][\w-]+)*")
"""Of choices, not of anything that Hydra reads otherwise."""

_FACTS: dict[str, Any] = {
    "choices": dict[str, str | None],
    "continued": list[Any],
    "images": dict[str, Any],
    "data": dict[str, Any],
    "command": str,
    "name": str,
    "run_name": str,
}
"""Types of the facts in environment.json that the program reads again."""

PATIENCE = 10.0
"""Seconds to wait until the processes of a killed run release its folder."""


class RunFolder:
    """The files of a run. `config.yaml` is written when training begins, `results.json` when everything is done."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.checkpoint = path / "checkpoints" / "last.ckpt"
        self.metrics = path / "metrics.csv"
        self.results = path / "results.json"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def begun(self) -> bool:
        """True if the folder holds a run, finished or not."""
        return self.config.exists()

    @property
    def done(self) -> bool:
        """True if the folder holds a finished run."""
        return self.results.exists()

    @property
    def advice(self) -> str:
        """Advice to the user: how to continue with this folder."""
        if self.checkpoint.exists():
            return f"continue with resume={self}"
        return f"make the page with: python -m icl_msr.report {self}" if self.done else "repeat the command"

    def farewell(self, cause: str, steps: int | None = None) -> str:
        """Return the message of a run that was stopped after `steps` steps; None means before or after training."""
        if not self.checkpoint.exists():
            return f"Stopped by {cause} before anything was trained; the same command begins again."
        after = "" if steps is None else f" after {steps} steps"
        return f"Stopped by {cause}{after}; all is saved. Continue with: python -m icl_msr.run resume={self}"

    def farewell_of_evaluation(self, cause: str) -> str:
        """Return the message of an evaluation that was stopped when it wrote its results."""
        if not self.done:
            return again(cause)
        return f"Stopped by {cause}; the results are complete. Make their page with: python -m icl_msr.report {self}"

    def require_format(self) -> None:
        """Check that the folder has the format of this version of the program.

        Raises:
            UserError: its format is another one, or is not said; or see `require_inside`.
        """
        self.require_inside()
        facts = self.facts()
        found, writer = (facts.get(key) for key in ("format", "icl_msr"))
        if found != FORMAT:
            said = "does not say its format" if found is None else f"has format {found}"
            by = f"icl-msr {writer}, which wrote it" if writer else "the version of icl-msr that wrote it"
            raise UserError(f"{self} {said}, and this version reads format {FORMAT}; use {by}, or repeat the run.")

    def require_inside(self) -> None:
        """Check that no link leads out of the folder, and that it holds only files and folders.

        Otherwise the program could read or write elsewhere, or wait for ever.

        Raises:
            UserError: a link leads out, or an entry is neither a file nor a folder.
        """
        inside = os.path.realpath(self.path)
        for folder, folders, files in os.walk(self.path):
            for path in (os.path.join(folder, name) for name in (*folders, *files)):
                if os.path.islink(path):
                    if os.path.commonpath((inside, os.path.realpath(path))) != inside:
                        raise UserError(f"{shown(path)} leads out of the run's folder; put a copy in its place.")
                elif not (os.path.isfile(path) or os.path.isdir(path)):
                    raise UserError(f"{shown(path)} is neither a file nor a folder; remove it.")

    def saved_config(self, *, resolve: bool = True) -> dict[str, Any]:
        """Return the config of the run. Interpolations are resolved if `resolve` is true, else kept.

        Raises:
            UserError: the folder is of another format, or the file is missing, damaged or more than data (see
                `core.saved`).
        """
        self.require_format()
        if not self.begun:
            raise UserError(f"{self} has no config.yaml; {ADVICE}.")
        with readable(self.config, ADVICE):
            whole = self.with_new_keys(read(self.config))
            saved: Any = OmegaConf.to_container(OmegaConf.create(whole), resolve=resolve)
        return {str(key): value for key, value in saved.items()}

    def with_new_keys(self, saved: Any) -> dict[str, Any]:
        """Return a saved config, completed with today's values of all keys that its choices have gained since."""
        choices: dict[str, str] = self.facts().get("choices", {})
        words = tuple(
            f"{group}=[{choice.replace('+', ',')}]" if group in PLURAL else f"{group}={choice}"
            for group, choice in choices.items()
            if group in Settings.model_fields and choice and _NAMES.fullmatch(choice)
        )
        today = {key: value for key, value in _today(words).items() if key in saved or key not in choices}
        return with_new_keys({str(key): value for key, value in saved.items()}, today)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write `environment.json`: the origin of the run and the format of its folder."""
        self.write(self.environment.name, {"format": FORMAT, **facts})

    def facts(self) -> dict[str, Any]:
        """Return the content of `environment.json`; nothing if there is no such file.

        Raises:
            UserError: it is damaged.
        """
        try:
            with readable(self.environment, ADVICE):
                facts = read_json(self.environment, ADVICE)
                return facts | {key: fit(facts[key], kind, key) for key, kind in _FACTS.items() if key in facts}
        except FileNotFoundError:
            return {}

    def metric(self) -> float:
        """Return the value that the finished run gave to the sweeper; NaN if it has none.

        Raises:
            UserError: `results.json` is damaged.
        """
        value = Outcome.load(self.path).metric.get("value")
        return float("nan") if value is None else float(value)

    def logged(self) -> list[dict[str, str]]:
        """Return the rows of `metrics.csv` by column, without empty cells; nothing if there is no such file.

        Raises:
            UserError: it is damaged.
        """
        advice = "restore it from a copy, or remove it, and the run goes on without its curves"
        try:
            return read_table(self.metrics, advice)
        except FileNotFoundError:
            return []

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write plain data as indented JSON, whole or not at all."""
        atomic_write(self.path / name, json.dumps(content, indent=2) + "\n", self.advice)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder inside the context, so that no other process writes to it.

        The operating system releases the lock when the process ends for any reason.

        Raises:
            UserError: another process writes here.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        break  # a file system without locks
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self} is being written by another process; wait for its end, or choose another "
                        "hydra.run.dir."
                    )
                time.sleep(0.1)
            yield
        finally:
            os.close(folder)


@cache
def _today(words: tuple[str, ...]) -> dict[str, Any]:
    """Return the config that the choices give today, without choices that this installation does not have."""
    today = _composed(words) or _composed([word for word in words if _composed([word])]) or {}
    return {str(key): value for key, value in today.items()}


def _composed(words: Sequence[str]) -> dict[Any, Any] | None:
    from icl_msr.core.compose import compose  # which brings Hydra along

    try:
        composed = OmegaConf.to_container(compose(words))
    except Exception:
        return None
    return composed if isinstance(composed, dict) else None
