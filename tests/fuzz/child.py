"""One command line in a forked child that stops where training would begin, and what may be wrong with its end."""

import copy
import gc
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytorch_lightning as pl
import wandb
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from PIL import Image
from support.inprocess import execute

from fuzz.grammar import SMALL, TRAINING, Line
from icl_msr import evaluate, export, textures
from icl_msr.cli import evaluating, job, quilting
from icl_msr.cli.command import main
from icl_msr.cli.sweeps import ProcessLauncher
from icl_msr.report import __main__ as report

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": lambda words: main(job.run, words),
    "evaluate": evaluate.main,
    "export": export.main,
    "textures": textures.main,
    "report": report.main,
}
CODES = (0, 2, 75, 130)
SECONDS = 120
"""A child that computes longer, or waits five times as long, is killed. One that trains has ten times as much."""
MEMORY = 8 << 30
"""Bytes that a child may use, so that no line can take the machine down."""
_PLACE = re.compile(
    r"(?:\+*(?:hydra\.run\.dir|hydra\.sweep\.dir|resume|to|cache|dataset\.cache)|--to|--out)=(.*)", re.DOTALL
)
_CACHE = re.compile(r"(?:\+*dataset\.cache|cache)=(.*)", re.DOTALL)
STORES = {
    "mlflow": ("here/mlflow.db", "here/mlruns"),
    "trackio": ("home/.cache/huggingface/trackio",),
}
"""Places of dashboards outside the folder of a run, where the viewers of these dashboards look."""


@dataclass
class End:
    """How a child ended."""

    code: int
    out: str
    err: str
    written: list[Path]
    """Files and folders that are new or changed."""


class World:
    """A folder with a run, photographs and files that are none. A line has a copy of it that no line has written to."""

    def __init__(self, folder: Path):
        self.template, self.lines = folder / "template", folder / "lines"
        here = self.template / "here"
        for made in (here / "empty", self.template / "home", self.lines):
            made.mkdir(parents=True)
        back = os.getcwd()
        os.chdir(here)
        try:
            done = execute(*SMALL, *TRAINING, "evaluation=none", "method.queue_size=64", "hydra.run.dir=run")
            assert done.code == 0, done.err
            Path("file").write_text("Nothing.")
            shutil.copytree("run", "damaged", ignore=shutil.ignore_patterns("checkpoints"))
            Path("damaged/config.yaml").write_text("seed: [")
            for number in range(48):
                file = Path("photos", "ab"[number % 2], f"{number}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((24, 24), number + 1).save(file)
            images, labels = np.zeros((32, 8, 8, 3), np.uint8), np.arange(32) % 2
            np.savez("arrays.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
        finally:
            os.chdir(back)
        _hasten_hydra()
        self.place, self.before = self._copy()

    def end(self, line: Line, *, stops: bool = True) -> End:
        """Return how a line ends, in a copy of this world. It stops where training would begin if `stops` is true."""
        out, err = self.lines / "out", self.lines / "err"
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()  # the child need not look at what it inherits
        child = os.fork()
        if child == 0:
            _live(line, self.place, out, err, stops)
        gc.unfreeze()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        written = [path for path, facts in _content(self.place).items() if self.before.get(path) != facts]
        if written:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place, self.before = self._copy()
        return End(code, *(file.read_bytes().decode(errors="replace") for file in (out, err)), written)

    def _copy(self) -> tuple[Path, dict[Path, tuple[int, int]]]:
        """Return a copy of the template for the next lines, and its content."""
        place = Path(tempfile.mkdtemp(dir=self.lines))
        shutil.copytree(self.template, place, dirs_exist_ok=True, copy_function=_copy, symlinks=True)
        return place, _content(place)


def fault(line: Line, end: End) -> str | None:
    """Return what is wrong with an end; None if it is as it should be."""
    if "Traceback (most recent call last)" in end.err:
        frames = re.findall(r'File "(.*?)", line (\d+)', end.err)
        ours = [f"{Path(file).name}:{number}" for file, number in frames if "/icl_msr/" in file]
        return f"traceback at {(ours or ['?'])[-1]}: {end.err.strip().splitlines()[-1][:300]}"
    if end.code not in CODES:
        return f"exit code {end.code}: {end.err[-300:]!r}"
    said = end.err.splitlines()
    refused = end.code == 2 and not {"-m", "--multirun"} & {*line.words}  # a sweep keeps the record of a refused job
    if refused and not (len(said) == 1 and said[0].rstrip()[-1:] in tuple(".?'\")")):
        return f"not one sentence: {end.err[:500]!r}"
    places = [Path("here", p) for p in ([".cache"] if refused else ["runs", ".cache"])] + _places(line, refused)
    strays = [path for path in end.written if not any(path.is_relative_to(p) or p.is_relative_to(path) for p in places)]
    return f"exit code {end.code}, and written: {', '.join(map(str, strays[:5]))}" if strays else None


def _places(line: Line, refused: bool) -> list[Path]:
    """Return where a line may write, relative to its world: nowhere but a cache if it was refused."""
    pattern = _CACHE if refused else _PLACE
    typed = [found[1] for word in line.words if (found := pattern.fullmatch(word))]
    if not refused:
        typed += [after for word, after in zip(line.words, line.words[1:], strict=False) if word in ("--to", "--out")]
        typed += line.words if line.door in ("export", "report") else ()
        typed += [f"{word}/.." for word in line.words if line.door == "report"]  # the summary is beside a run
    stores = [Path(path) for name, paths in STORES.items() if any(name in w for w in line.words) for path in paths]
    homely = ("../home" + path[1:] if path[:1] == "~" else path for path in typed)
    named = [Path(os.path.normpath(os.path.join("here", path.strip("'\"")))) for path in homely]
    return named if refused else named + stores


def _hasten_hydra() -> None:
    """Let Hydra read each YAML file once, and compose each config once: the first time is only for `hydra.mode`."""
    mode, load, read = Hydra.get_mode, FileConfigSource.load_config, dict[tuple[str, str], Any]()

    def get_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        return mode(hydra, config_name, overrides) if any("hydra" in word for word in overrides) else RunMode.RUN

    def load_config(source: FileConfigSource, config_path: str) -> Any:
        key = source.path, config_path
        if key not in read:
            read[key] = load(source, config_path)
        return copy.deepcopy(read[key])

    Hydra.get_mode, FileConfigSource.load_config = get_mode, load_config  # type: ignore[method-assign]


def _copy(source: str, target: str) -> None:
    """Copy a small file, which a line may append to; link a large one, which is only ever replaced."""
    (os.link if os.path.getsize(source) > 100_000 else shutil.copy2)(source, target)


def _content(place: Path) -> dict[Path, tuple[int, int]]:
    found = [Path(folder, name) for folder, inner, files in os.walk(place) for name in (*inner, *files)]
    facts = [(path, path.lstat(), path.is_dir()) for path in found]
    return {path.relative_to(place): (0, 0) if d else (s.st_mtime_ns, s.st_size) for path, s, d in facts}


def _stop(*_: Any, **__: Any) -> NoReturn:
    raise SystemExit(0)


def _no_network(*_: Any, **__: Any) -> NoReturn:
    raise OSError(101, "Network is unreachable")


def _live(line: Line, place: Path, out: Path, err: Path, stops: bool) -> NoReturn:
    """Be the child: run the command and exit with its code."""
    code = 1
    gc.disable()
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.chdir(place / "here")
        os.environ |= {"HOME": str(place / "home"), "WANDB_MODE": "offline", "TQDM_DISABLE": "1"}
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        seconds = SECONDS if stops else 10 * SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
        signal.alarm(5 * seconds)
        socket.socket.connect = _no_network  # type: ignore[method-assign]
        ProcessLauncher._exit_code = lambda *_: 75  # type: ignore[method-assign]
        job.run_ranks = evaluating.run_ranks = lambda *_: 75
        if stops:
            pl.Trainer.fit = wandb.init = wandb.setup = quilting.write = evaluating.Results = _stop  # type: ignore
        sys.argv = [f"icl_msr.{line.door}", *line.words]
        code = MAINS[line.door](line.words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
