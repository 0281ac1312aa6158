"""What every dashboard shares: facts about a run, its pictures, and what happens when a dashboard cannot write."""

import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, runtime_checkable

import numpy as np

from icl_msr.core.errors import UserError, reason
from icl_msr.core.storage import read_json, readable

Given = ParamSpec("Given")


@dataclass(frozen=True)
class About:
    """The facts about a run that a dashboard shows."""

    name: str
    """The choices of the run, what its sweep varies, and the seed."""
    group: str | None
    """Name of the sweep; None outside a sweep."""
    job_type: str | None
    """The settings without the seed."""
    config: dict[str, Any]
    """The composed config, and the facts `choices`, `derived`, `environment` and `data`."""
    resumed_at: int | None
    """Optimiser steps done when the run was continued; None for a fresh start."""


class Picture(NamedTuple):
    """A picture for a dashboard."""

    file: Path
    caption: str


@runtime_checkable
class Dashboard(Protocol):
    """A logger that also takes pictures and the results of a finished run. Lightning's own take only curves."""

    def show(self, pictures: Mapping[str, Picture], step: int) -> None:
        """Log pictures by name while the run trains. The files may be gone afterwards."""

    def histograms(self, values: Mapping[str, np.ndarray[Any, Any]], step: int) -> None:
        """Log the distributions of finite values by name while the run trains."""

    def conclude(self, folder: Path) -> None:
        """Log the results and the pictures of a finished run."""

    def close(self, exit_code: int) -> None:
        """End the run with its exit code."""


def figures(folder: Path) -> dict[str, Picture]:
    """Return the pictures in the folder of a run by their names on a dashboard."""
    file = folder / "figures" / "captions.json"
    captions = read_json(file, "remove it") if file.exists() else {}
    return {
        f"pictures/{Path(name).stem}": Picture(folder / "figures" / name, caption) for name, caption in captions.items()
    }


class Losable(Protocol):
    """A dashboard that may be lost while the run trains."""

    product: str
    """Its name in messages."""
    lost: bool
    """Whether nothing more is sent to it, because it could not write or because this is not the first rank."""


@contextmanager
def forgiving(dashboard: Losable) -> Iterator[None]:
    """Let the run go on if its dashboard cannot write. One line says so."""
    try:
        yield
    except Exception as error:
        if not dashboard.lost:
            said = f"{dashboard.product} cannot write ({reason(error)}); the run goes on without it."
            print(said, file=sys.stderr)
        dashboard.lost = True


def unless_lost(
    call: Callable[Concatenate[Any, Given], None],
) -> Callable[Concatenate[Any, Given], None]:
    """Decorate a call of a dashboard: it is skipped after the dashboard was lost, and may lose it."""

    @wraps(call)
    def guarded(dashboard: Any, /, *args: Given.args, **keys: Given.kwargs) -> None:
        if not dashboard.lost:
            with forgiving(dashboard):
                call(dashboard, *args, **keys)

    return guarded


def identity(file: Path, about: About) -> str | None:
    """Return what a dashboard calls the run that is continued, from a file in the run's folder; None for a new run."""
    if about.resumed_at is None or not file.exists():
        return None
    with readable(file, "remove it, and the run has a new id"):
        return file.read_text().strip()


def new_identity() -> str:
    """Return a name that no other run has."""
    return secrets.token_hex(4)


def require_package(package: str, product: str, extra: str) -> None:
    """Check that the package of a dashboard is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec(package) is None:
        raise UserError(
            f"logger={extra} needs {product}, which is not installed; type: pip install 'icl-msr[{extra}]'."
        )
