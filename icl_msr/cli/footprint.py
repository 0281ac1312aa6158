"""The folders that a command makes. A new folder is never shared, and a refused command leaves none behind."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from icl_msr.core import slurm
from icl_msr.core.compose import known_to_hydra
from icl_msr.core.errors import SharedMistake, UserError
from icl_msr.core.ranks import is_rank
from icl_msr.core.storage import require_local
from icl_msr.core.terminal import complain

_RECORDS = ({"sweep.json", "multirun.yaml"}, {"config.yaml", "hydra.yaml", "overrides.yaml"})
"""Files of a sweep without jobs, and of Hydra in `hydra.output_subdir`."""


class Footprint(Callback):
    """A Hydra callback that notes the folders a command makes, so that a refused command can remove them."""

    made: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Note the folder of a run before Hydra makes it."""
        with known_to_hydra(config):
            self.begin(str(config.hydra.run.dir), "hydra.run.dir", str(config.hydra.output_subdir or ""))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Note the folder of a sweep before Hydra makes it."""
        self.begin(str(config.hydra.sweep.dir), "hydra.sweep.dir")

    @classmethod
    def begin(cls, folder: str, key: str, inner: str = "") -> None:
        """Note the folder that a key names, and one inside it. A key that names no local folder ends the command."""
        try:
            require_local(folder, key)
        except UserError as mistake:
            refuse(str(mistake))
        cls.note(Path(folder, inner))

    @classmethod
    def note(cls, folder: Path) -> None:
        """Remember `folder` and those of its parents that do not exist yet."""
        folder = folder.absolute()
        cls.made += [path for path in (folder, *folder.parents) if not path.exists()]

    @classmethod
    def erase(cls) -> None:
        """Remove the noted folders, unless they hold more than what Hydra writes before a job begins."""
        for folder in sorted(set(cls.made), key=lambda path: len(path.parts), reverse=True):
            if folder.is_dir() and any({path.name for path in folder.iterdir()} <= records for records in _RECORDS):
                for record in folder.iterdir():
                    record.unlink()
                with suppress(OSError):
                    folder.rmdir()


def run_folder(root: str, name: str) -> str:
    """Return the folder of a run, below `root`, for a command that names none.

    A batch job of SLURM has the same folder for the same words whenever it runs, so a requeued job finds its run. Ranks
    that others have started have the same folder without talking to each other. Any other command makes a new folder.
    """
    if slurm.in_batch_job():
        words = " ".join(word for word in sys.argv[1:] if not word.startswith("hydra.run."))
        return f"{root}/slurm/{slurm.job()}-{name}-{sha256(words.encode()).hexdigest()[:6]}"
    if is_rank():
        return f"{root}/{_start()}-{name}"
    return new_folder(f"{root}/{datetime.now():%Y-%m-%d/%H-%M-%S}-{name}")


def _start() -> str | None:
    """Return a name that all processes of one start of torchrun or srun know, and no other start has."""
    if (run := os.environ.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        return f"torchrun/{run}"
    step = slurm.step(os.environ)
    return f"slurm/{slurm.job()}.{step}" if step else None


def require_common_folder(words: Sequence[str]) -> None:
    """Check that ranks that others have started can know each other's folder.

    Raises:
        SharedMistake: they cannot, and no word names one.
    """
    named = any(word.startswith("hydra.run.dir=") for word in words)
    if is_rank() and not (named or slurm.in_batch_job() or _start()):
        raise SharedMistake(
            "Several processes were started together, and none knows the others' folder; add hydra.run.dir=FOLDER."
        )


def new_folder(path: str) -> str:
    """Make a folder that no other process uses, `path` or `path-2` and so on, and return its name.

    Names hold the time in seconds, and two commands may start in the same second.
    """
    for number in count(1):
        folder = Path(path if number == 1 else f"{path}-{number}")
        Footprint.note(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not folder.parent.is_dir():
                break
        except OSError:
            break
        else:
            return str(folder)
    return path  # it cannot be made; Hydra tries again and says why


def refuse(message: str) -> NoReturn:
    """Print a message and exit with code 2. In a callback, Hydra would turn an exception into a warning."""
    complain(message)
    Footprint.erase()
    sys.exit(2)
