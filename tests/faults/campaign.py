"""What is done to commands, what they say, and what is left. `make faults` prints one table.

Each row starts a small command, waits for a phase and a random moment of its CPU time, does the harm, and reads how the
command ends. Then the harm is undone, the command that the sentence names is typed, and the weights and the curves are
compared with those of a run that was left alone.
"""

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from support.programs import Program, Programs, same, steps, until
from support.tiny import DATA, MODEL

RUN = (
    *(*DATA, *MODEL, "method=moco", "method.queue_size=20", "regularizer=msr", "regularizer.every=2"),
    *("negatives=patch", "hardware=cpu", "hardware.precision=32-true", "logger=csv", "evaluation=light"),
    *("trainer.max_epochs=3", "trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_minutes=0.0001"),
)
RANKS = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.precision=32-true")
TMPFS = 40_000_000
"""Size of the file system of a run, in bytes: room for everything."""


@dataclass
class Scene:
    """A command at work: its process, its folder on a file system of its own, and the run that it reads."""

    programs: Programs
    disk: Path
    words: tuple[str, ...] = RUN
    module: str = "icl_msr.run"
    program: Program | None = None

    @property
    def folder(self) -> Path:
        """The folder that the command writes."""
        return self.disk / "run"

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self.program is not None
        return self.program.process.pid

    def command(self) -> tuple[str, ...]:
        """Return the words of the command, with its folder."""
        key = {"icl_msr.run": "hydra.run.dir=", "icl_msr.evaluate": "to="}.get(self.module, "--out=")
        return (*self.words, f"{key}{self.folder}")


Harm = Callable[[Scene], object]


@dataclass
class Fault:
    """A row of the table: when, what is done, and how it is undone."""

    phase: str
    name: str
    do: Harm
    undo: Harm = lambda _: None
    codes: tuple[int, ...] = (2,)
    words: tuple[str, ...] = RUN
    module: str = "icl_msr.run"
    before: bool = False
    """Whether it is done before the command starts."""


@dataclass
class Row:
    """What came of a fault."""

    fault: Fault
    said: str
    code: int
    after: str

    @property
    def good(self) -> bool:
        """True if the command ended in a sentence or by the kill, and the rest was as without the fault."""
        told = (self.code in (2, 75)) <= self.said.count("\n") <= 1 and "Traceback" not in self.said
        return told and self.code in self.fault.codes and self.after == "equal"


# ----------------------------------------------------------------------------------------------------- what is done


def send(number: signal.Signals) -> Harm:
    return lambda scene: os.kill(scene.pid, number)


def fill(scene: Scene) -> None:
    """Fill the disk with something else."""
    with suppress(OSError), (scene.disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65_536))


def empty(scene: Scene) -> None:
    (scene.disk / "ballast").unlink(missing_ok=True)


def remount(options: str, scene: Scene) -> None:
    """Mount the disk again with other options, as soon as no file on it is open for writing."""
    line = ["mount", "-o", f"remount,{options}", str(scene.disk)]
    until(lambda: subprocess.run(line, capture_output=True, check=False).returncode == 0, 20)


def limit(size: int, scene: Scene) -> None:
    """Limit the size of files that the process writes, as `ulimit -f` does."""
    resource.prlimit(scene.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def delete(scene: Scene) -> None:
    while scene.folder.exists():
        shutil.rmtree(scene.folder, ignore_errors=True)


def kill_rank(number: int, scene: Scene) -> None:
    os.kill(scene.programs.rank(number), signal.SIGKILL)


def kill_and_cut(name: str, scene: Scene) -> None:
    """Kill the run, keep a copy of a file, cut it, and begin again."""
    assert scene.program is not None
    scene.program.process.kill()
    scene.program.wait()
    file = scene.folder / name
    shutil.copy(file, scene.disk / "copy")
    os.truncate(file, file.stat().st_size // 2)
    scene.program = scene.programs.start(f"resume={scene.folder}")


def put_back(name: str, scene: Scene) -> None:
    shutil.copy(scene.disk / "copy", scene.folder / name)


WRITABLE, READ_ONLY = partial(remount, "rw"), partial(remount, "ro")
ROOM = partial(remount, f"size={TMPFS}")
PHASES = ("start", "training", "evaluation", "report")
SIGNALS = dict(zip(PHASES, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), strict=True))
WRITING = PHASES[1:]
REPORT = ("{finished}",)
EVALUATE = ("run={finished}", "evaluation=light", "cache=null", "hardware=cpu")
FAULTS = [
    *(Fault(phase, "SIGKILL", send(signal.SIGKILL), codes=(137, 0)) for phase in PHASES for _ in range(2)),
    *(Fault(phase, number.name, send(number), codes=(75, 0)) for phase, number in SIGNALS.items()),
    *(Fault("start", f"tmpfs of {m} MB", partial(remount, f"size={m}m"), ROOM, before=True) for m in (1, 8)),
    *(Fault(phase, "disk full", fill, empty) for phase in WRITING),
    *(Fault(phase, "read-only", READ_ONLY, WRITABLE) for phase in WRITING),
    *(Fault(phase, "folder deleted", delete) for phase in WRITING),
    *(Fault(phase, "ulimit -f 1", partial(limit, 1024)) for phase in WRITING),
    Fault("training", "disk full, W&B", fill, empty, words=(*RUN, "logger=[wandb,tensorboard]")),
    *(
        Fault("training", f"{name} cut", partial(kill_and_cut, name), partial(put_back, name))
        for name in ("checkpoints/last.ckpt", "config.yaml", "environment.json")
    ),
    *(
        Fault("training", f"rank {number} killed", partial(kill_rank, number), codes=(137,), words=(*RUN, *RANKS))
        for number in (0, 1)
    ),
    *(Fault("start", name, send(number), codes=(code,), words=EVALUATE, module="icl_msr.evaluate")
      for name, number, code in (("evaluate, SIGINT", signal.SIGINT, 75), ("evaluate, SIGKILL", signal.SIGKILL, 137))),
    Fault("start", "evaluate, disk full", fill, empty, words=EVALUATE, module="icl_msr.evaluate"),
    Fault("start", "report, disk full", fill, empty, words=REPORT, module="icl_msr.report"),
    Fault("start", "report, read-only", READ_ONLY, WRITABLE, words=REPORT, module="icl_msr.report"),
    Fault("start", "report, SIGTERM", send(signal.SIGTERM), codes=(75,), words=REPORT, module="icl_msr.report"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ how it goes


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system in memory, for one command."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def may_mount(folder: Path) -> bool:
    """Return whether this process may mount file systems."""
    try:
        with disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def cpu(pid: int) -> float:
    """Return the CPU time of a process so far, in seconds; infinity once it is gone."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reached(scene: Scene, phase: str) -> bool:
    """Return whether a command has come to a phase, or has ended."""
    assert scene.program is not None
    if scene.program.process.poll() is not None:
        return True
    if phase == "start":
        with suppress(OSError):
            heavy = "/matplotlib/" if scene.module == "icl_msr.report" else "libtorch"
            return heavy in Path("/proc", str(scene.pid), "maps").read_text()
        return True
    if phase == "training":
        return steps(scene.folder) >= 3
    return (scene.folder / {"evaluation": "encoder.json", "report": "results.json"}[phase]).exists()


def suffer(fault: Fault, scene: Scene, moments: random.Random) -> Row:
    """Do the harm, read the answer, undo the harm, and do what the answer says."""
    if fault.before:
        fault.do(scene)
    scene.program = scene.programs.start(*scene.command(), module=fault.module)
    if not fault.before:
        until(lambda: reached(scene, fault.phase))
        later = cpu(scene.pid) + (moments.uniform(0, 0.4) if "SIG" in fault.name else 0)
        until(lambda: cpu(scene.pid) >= later)
        with suppress(ProcessLookupError):
            fault.do(scene)
    code = scene.program.wait(300)
    code, said = code if code >= 0 else 128 - code, scene.program.err
    scene.programs.gone(60)
    fault.undo(scene)
    if "resume=" in said or (
        code == 137 and scene.folder.joinpath("config.yaml").exists() and "ddp" not in str(scene.words)
    ):
        words = (f"resume={scene.folder}",)
    else:
        words = scene.command()
    again = scene.programs.start(*words, module=fault.module)
    return Row(fault, said, code, "" if again.wait(300) == 0 else again.err or "it failed")


def compared(whole: Path, continued: Path) -> str:
    """Return `equal` if weights, optimisers and curves of two runs are equal to the last bit, apart from times."""
    try:
        one, other = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (whole, continued))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            same(one[key], other[key], key)
        if not (continued / "report.html").read_text().endswith("</html>"):
            return "no page"
    except (AssertionError, OSError) as error:
        return f"{error} differs"
    tables = [list(csv.DictReader((run / "metrics.csv").open())) for run in (whole, continued)]
    for row, theirs in zip(*tables, strict=False):
        wrong = [name for name in row if name != "images_per_second" and row[name] != theirs[name]]
        if wrong:
            return f"{wrong[0]} of step {row['step']} differs"
    return "equal" if len(tables[0]) == len(tables[1]) else "rows are missing"


def carry_out(faults: list[Fault], home: Path, seed: int = 0) -> Iterator[Row]:
    """Yield the row of each fault, as soon as it is there."""
    programs, moments = Programs(home), random.Random(seed)
    whole: dict[tuple[str, ...], Path] = {}

    def left_alone(words: tuple[str, ...]) -> Path:
        words = tuple(word for word in words if "wandb" not in word)
        if words not in whole:
            whole[words] = home / f"whole-{len(whole)}"
            program = programs.start(*words, f"hydra.run.dir={whole[words]}")
            assert program.wait() == 0, program.err
        return whole[words]

    try:
        for number, fault in enumerate(faults):
            finished = left_alone(fault.words if fault.module == "icl_msr.run" else RUN)
            words = tuple(word.format(finished=finished) if "{f" in word else word for word in fault.words)
            with disk(home / f"disk-{number}") as place:
                row = suffer(fault, Scene(programs, place, words, fault.module), moments)
                if not row.after:
                    trains = fault.module == "icl_msr.run"
                    row = replace(row, after=compared(finished, place / "run") if trains else "equal")
                yield row
    finally:
        programs.close()


def line(row: Row, home: Path) -> str:
    """Return a row of the table as text."""
    said = " / ".join(row.said.replace(str(home), "").split("\n")[:-1][-2:]) or "-"
    mark = " " if row.good else "!"
    return f"{mark} {row.fault.phase:<10} {row.fault.name:<26} {row.code:>3}  {row.after:<14.60} {said[:400]}"


def main(home: Path, only: str = "") -> int:
    """Print the table and return the number of rows that are not as they should be."""
    bad = 0
    for row in carry_out([fault for fault in FAULTS if only in f"{fault.phase} {fault.name}"], home):
        print(line(row, home), flush=True)
        bad += not row.good
    return bad


if __name__ == "__main__":
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        wrong = main(Path(place).resolve(), *sys.argv[1:2])
    print(f"{wrong} rows are not as they should be, after {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))
