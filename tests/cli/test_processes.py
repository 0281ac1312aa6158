"""Ranks as processes: they train as one, end together, say why, and leave nothing behind."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.programs import Programs, same, slurm_batch, steps, until
from support.tiny import DATA, MODEL, pieces

import icl_msr
from icl_msr.cli import processes
from icl_msr.cli.command import main
from icl_msr.cli.footprint import Footprint, new_folder
from icl_msr.cli.job import run
from icl_msr.cli.processes import clean_environment, in_folder, run_ranks
from icl_msr.core.config import config_dir
from icl_msr.core.errors import UserError
from icl_msr.core.ranks import VARIABLES, _of_open_mpi, _of_slurm, adopt, is_first, is_rank, outside_world_size
from icl_msr.core.records import Outcome
from icl_msr.report.runs import read_curves

CHECKOUT = Path(icl_msr.__file__).parents[1]

# ------------------------------------------------------------------------------------------ what a process is told


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nothing says that there are other processes. What `adopt` sets is removed afterwards."""
    for name in {*VARIABLES, *(os.environ.keys() - clean_environment().keys())}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_clean_environment_says_nothing_of_ranks(alone: pytest.MonkeyPatch) -> None:
    alone.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ICL_MSR_LEASH"):
        alone.setenv(name, "1")
    assert clean_environment() == before
    alone.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert clean_environment(3) == {**before, "OMP_NUM_THREADS": "2"}
    assert clean_environment(99)["OMP_NUM_THREADS"] == "1"
    alone.setenv("OMP_NUM_THREADS", "5")
    assert clean_environment(3)["OMP_NUM_THREADS"] == "5"


def step(rank: int, tasks_per_node: str, nodes: str, **more: str) -> dict[str, str]:
    """Return the variables of a task of srun, in a job of more tasks than the step has."""
    sizes = [int(size) for size in tasks_per_node.split(",")]
    node = next(node for node in range(len(sizes)) if rank < sum(sizes[: node + 1]))
    numbers = {"PROCID": rank, "LOCALID": rank - sum(sizes[:node]), "NODEID": node, "NTASKS": 9, "NNODES": 9}
    numbers |= {"JOB_ID": 7, "STEP_ID": 0, "STEP_NUM_TASKS": sum(sizes), "STEP_NUM_NODES": len(sizes)}
    texts = {"STEP_TASKS_PER_NODE": tasks_per_node, "STEP_NODELIST": nodes, "NODELIST": "login", **more}
    return {f"SLURM_{name}": str(value) for name, value in {**numbers, **texts}.items()}


def mpirun(rank: int, local_rank: int, size: int, local_size: int) -> dict[str, str]:
    """Return the variables of a process of Open MPI, which srun may have started for mpirun, one on each machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": local_rank, "SIZE": size, "LOCAL_SIZE": local_size}
    ours = {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in numbers.items()}
    return {**step(rank // local_size, ",".join("1" * (size // local_size)), "n[1-2]"), **ours, "PMIX_NAMESPACE": "a"}


INTERACTIVE = str(0xFFFFFFFA)
SITUATIONS: dict[str, tuple[dict[str, str], str]] = {
    # who started us: rank/world size, rank/processes on its machine, machine/machines, the first machine
    "nobody": ({}, ""),
    "half of torchrun's variables": ({"LOCAL_RANK": "1"}, ""),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, "3/4 1/? 1/? ?"),
    "torchrun in a step of one task for each machine": (
        {**step(1, "1,1", "n[1-2]"), "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
        "3/4 1/? ?/? ?",
    ),
    "our own ranks in a batch script": ({**slurm_batch(4), "RANK": "1", "WORLD_SIZE": "2"}, "1/2 ?/? ?/? ?"),
    "a batch script of several tasks": (dict(slurm_batch(4)), ""),
    "a batch script with a name of its step": ({**slurm_batch(4), "SLURM_STEP_ID": "batch"}, ""),
    "a shell of salloc": ({**slurm_batch(4), "SLURM_STEP_ID": INTERACTIVE}, ""),
    "a shell of salloc that says more": (step(0, "4", "n1", STEP_ID=INTERACTIVE), ""),
    "srun -n 1": (step(0, "1", "n1"), ""),
    "srun -n 2": (step(1, "2", "n1"), "1/2 1/2 0/1 127.0.0.1"),
    "srun -n 2 in an old SLURM": ({**slurm_batch(2), "SLURM_STEP_ID": "0"}, "0/2 0/2 0/1 127.0.0.1"),
    "srun -N 2 -n 2": (step(1, "1,1", "n[1-2]"), "1/2 0/1 1/2 n1"),
    "srun -N 2 --ntasks-per-node 2": (step(2, "2,2", "gpu[07-09,12],n1"), "2/4 0/2 1/2 gpu07"),
    "srun -N 2 -n 3": (step(2, "2,1", "a1,b[1-2]"), "2/3 0/1 1/2 a1"),
    "srun -n 2 in a job named bash": (step(0, "2", "n1", JOB_NAME="bash"), "0/2 0/2 0/1 127.0.0.1"),
    "srun -n 2 in a job named interactive": (step(1, "2", "n1", JOB_NAME="interactive"), "1/2 1/2 0/1 127.0.0.1"),
    "srun with an address of the user's": ({**step(1, "1,1", "n[1-2]"), "MASTER_ADDR": "ib1"}, "1/2 0/1 1/2 ib1"),
    "mpirun -n 1": (mpirun(0, 0, 1, 1), ""),
    "mpirun -n 2": (mpirun(1, 1, 2, 2), "1/2 1/2 0/1 127.0.0.1"),
    "mpirun -n 4 on two machines of a job": (mpirun(3, 1, 4, 2), "3/4 1/2 1/2 login"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_who_started_us(situation: str, alone: pytest.MonkeyPatch) -> None:
    given, expected = SITUATIONS[situation]
    for name, value in given.items():
        alone.setenv(name, value)
    adopt()
    known = {name: os.environ.get(name, "?") for name in VARIABLES}
    text = "{RANK}/{WORLD_SIZE} {LOCAL_RANK}/{LOCAL_WORLD_SIZE} {GROUP_RANK}/{GROUP_WORLD_SIZE} {MASTER_ADDR}"
    assert outside_world_size() == (int(expected[2]) if expected else None)
    assert is_rank() == bool(expected)
    assert is_first() == (expected[:1] in ("", "0"))
    if expected:
        assert text.format(**known) == expected


def test_ranks_of_one_step_meet_at_a_port_of_their_own(alone: pytest.MonkeyPatch) -> None:
    ports = {
        (job, number, rank): _of_slurm(step(rank, "2", "n1", JOB_ID=job, STEP_ID=number))["MASTER_PORT"]
        for job in ("7", "8")
        for number in ("0", "1")
        for rank in (0, 1)
    }
    assert len(set(ports.values())) == 4
    assert all(ports[job, number, 0] == ports[job, number, 1] for job, number, _ in ports)
    assert all(20000 <= int(port) < 30000 for port in ports.values())


def test_mpirun_without_a_first_machine_is_refused() -> None:
    known = {name: value for name, value in mpirun(3, 1, 4, 2).items() if not name.startswith("SLURM_")}
    with pytest.raises(UserError, match="MASTER_ADDR=<host>"):
        _of_open_mpi(known)


@pytest.mark.parametrize("folder", ["/a/b", "/with space/x=1", "/o'brien/{a,b}", "/ä,b"])
def test_any_folder_can_be_typed(folder: str) -> None:
    (word,) = OverridesParser.create().parse_overrides([in_folder(Path(folder))])
    assert (word.key_or_group, word.value()) == ("hydra.run.dir", folder)


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    log.write_bytes(b"first\n  last \xff \n\n")
    assert processes._last_line(log) == "last \ufffd"
    log.write_text("\n")
    assert processes._last_line(log) == f"{log} is empty."


MISFITS: list[tuple[str, dict[str, str], str]] = [
    (
        "hardware=ddp",
        {"RANK": "0", "WORLD_SIZE": "3"},
        "3 processes were started together on 1 machine, and hardware.devices=2 hardware.nodes=1 needs 2; "
        "type hardware.devices=3 hardware.nodes=1, or start a single process.",
    ),
    (
        "hardware=cpu",
        step(0, "2", "n1"),
        "2 processes were started together on 1 machine, and hardware.devices=1 hardware.nodes=1 needs 1; "
        "type hardware.devices=2 hardware.nodes=1, or start a single process.",
    ),
    (
        "hardware=ddp",
        step(0, "1,1", "n[1-2]"),
        "2 processes were started together on 2 machines, and hardware.devices=2 hardware.nodes=1 needs 2; "
        "type hardware.devices=1 hardware.nodes=2, or start a single process.",
    ),
    (
        "hardware=ddp",
        step(0, "2,1", "n[1-2]"),
        "3 processes were started together on 2 machines, and hardware.devices=2 hardware.nodes=1 needs 2; "
        "start as many on each, or start a single process.",
    ),
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("hardware", "started", "sentence"), MISFITS)
def test_a_world_that_does_not_fit_is_refused(
    hardware: str,
    started: dict[str, str],
    sentence: str,
    first: bool,
    alone: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence of the first rank, before anything is written."""
    for name, value in started.items():
        alone.setenv(name, value)
    if not first:
        alone.setenv("RANK" if "RANK" in started else "SLURM_PROCID", "1")
    alone.setattr(sys, "argv", ["icl_msr.run"])
    run_dir = tmp_path / "run"
    assert main(run, [*DATA, *MODEL, hardware, "hardware.accelerator=cpu", f"hydra.run.dir={run_dir}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{sentence}\n" if first else "")
    assert not run_dir.exists()


# -------------------------------------------------------------------------------------------- ranks without a program

FAKE = """
import os, signal, sys, time
from pathlib import Path
from icl_msr.cli.processes import hold_leash, told

hold_leash()
here = Path(sys.argv[-1].partition("=")[2].strip("'"))
(here / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))

def wait(name):
    while not (here / name).exists() or not (here / name).stat().st_size:
        time.sleep(0.01)

try:
    for word in sys.argv[1:-1]:
        if word.startswith(f"rank{os.environ['RANK']}="):
            exec(word.partition("=")[2])
except Exception as fault:
    if not told(fault):
        raise
    sys.exit(1)
"""


@pytest.fixture
def fake(tmp_path: Path, alone: pytest.MonkeyPatch) -> Path:
    """Ranks that do what a word says, at once. The folder is theirs."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "fake_ranks.py").write_text(FAKE)
    alone.setenv("PYTHONPATH", str(home))
    alone.setattr(processes, "MODULE", "fake_ranks")
    alone.setattr(processes, "GRACE", 1.0)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def dead(folder: Path) -> bool:
    return not any(Path("/proc", file.read_text()).exists() for file in folder.glob("pid-*"))


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
MISTAKE = "print('The disk is full.', flush=True); sys.exit(2)"
ENDS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "well": (("rank0=1", "rank1=1"), 0, ""),
    "one is killed": (
        ("rank0=time.sleep(99)", f"rank1=print('hello', flush=True); {KILL}"),
        137,
        "Rank 1 of 2 was killed by SIGKILL (out of memory?); the run was stopped; see {folder}/rank-1.log.\n",
    ),
    "the first is killed": (
        (f"rank0={KILL}", "rank1=time.sleep(99)"),
        137,
        "Rank 0 of 2 was killed by SIGKILL (out of memory?); the run was stopped.\n",
    ),
    "one raises and the first follows": (
        ("rank0=wait('rank-1.log'); raise OSError('closed by peer')", "rank1=raise ValueError('too\\nbad')"),
        1,
        "Rank 1 of 2 failed with ValueError: too; the run was stopped; see {folder}/rank-1.log.\n",
    ),
    "one raises and the first ends before it": (
        ("rank0=wait('rank-1.log'); sys.exit(1)", "rank1=told(ValueError()); time.sleep(0.5); sys.exit(1)"),
        1,
        "Rank 1 of 2 failed with ValueError; the run was stopped; see {folder}/rank-1.log.\n",
    ),
    "one raises and is stuck": (
        ("rank0=1", "rank1=told(ValueError('too bad')); time.sleep(99)"),
        1,
        "Rank 1 of 2 failed with ValueError: too bad; the run was stopped; see {folder}/rank-1.log.\n",
    ),
    "the first has a mistake to tell": ((f"rank0={MISTAKE}", "rank1=time.sleep(99)"), 2, ""),
    "both have the same mistake": ((f"rank0=wait('rank-1.log'); {MISTAKE}", f"rank1={MISTAKE}"), 2, ""),
    "one has a mistake to tell": (("rank0=time.sleep(99)", f"rank1={MISTAKE}"), 2, "The disk is full.\n"),
    "preempted": (("rank0=sys.exit(75)", "rank1=sys.exit(0)"), 75, ""),
    "one leaves": (
        ("rank0=time.sleep(99)", "rank1=print('hello', flush=True); os._exit(7)"),
        7,
        "Rank 1 of 2 ended with exit code 7; the run was stopped; see {folder}/rank-1.log.\n",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_ranks_end(end: str, fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, code, sentence = ENDS[end]
    assert run_ranks(2, [*words, in_folder(fake)], fake) == code
    assert capfd.readouterr().err == sentence.replace("{folder}", str(fake))
    assert dead(fake)
    # A log with nothing in it is not a file.
    assert (fake / "rank-1.log").exists() == ("hello" in words[1] or "Error" in words[1] or "disk" in words[1])


class Ended(NamedTuple):
    """What can be known of a rank."""

    code: int | None
    said: tuple[float, str, str] | None = None

    def poll(self) -> int | None:
        return self.code

    def fault(self) -> tuple[float, str, str] | None:
        return self.said


def failed(seconds: float) -> Ended:
    return Ended(1, (seconds, "OSError", ""))


FIRST: list[tuple[list[Ended], int | None]] = [
    ([Ended(None), Ended(None)], None),
    ([Ended(0), Ended(None)], None),
    ([Ended(None), Ended(3)], 1),
    ([Ended(2), Ended(2)], 0),
    ([failed(2.0), failed(1.0)], 1),  # the other noticed, however late we look
    ([failed(1.0), failed(2.0)], 0),
    ([Ended(1), failed(2.0)], 1),
    ([failed(1.0), Ended(-9)], 1),  # who is killed says nothing
]


@pytest.mark.parametrize(("ranks", "first"), FIRST)
def test_who_was_the_first(ranks: Any, first: int | None) -> None:
    assert processes._first_failure(ranks) == first


def test_the_first_rank_speaks_for_itself(fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("rank0=print('loss 1.0'); raise ValueError('too bad')", "rank1=time.sleep(99)", in_folder(fake))
    assert run_ranks(2, words, fake) == 1
    out, err = capfd.readouterr()
    assert out == "loss 1.0\n"
    first, *_, last_but_one, last = err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last_but_one == "ValueError: too bad"
    assert last == "Rank 0 of 2 failed with ValueError: too bad; the run was stopped."


def test_a_long_traceback_arrives(fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, ("rank0=raise ValueError('x' * 3_000_000)", "rank1=1", in_folder(fake)), fake) == 1
    assert capfd.readouterr().err.count("x") >= 3_000_000


HANDLER = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(99)"
SIGNALLED = [
    (f"rank0={HANDLER}", 75, ""),
    ("rank0=print('ready', flush=True); time.sleep(99)", 128 + signal.SIGTERM, "Stopped by SIGTERM.\n"),
]


@pytest.mark.parametrize(("word", "code", "said"), SIGNALLED, ids=["saves", "has nothing to save"])
def test_signals_are_passed_on(word: str, code: int, said: str, fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    signaller = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import os, signal, sys, time\nfrom pathlib import Path\n"
            f"while len(list(Path({str(fake)!r}).glob('pid-*'))) < 2: time.sleep(0.05)\n"
            f"time.sleep(0.5); os.kill({os.getpid()}, signal.SIGTERM)",
        ]
    )
    before = signal.getsignal(signal.SIGTERM)
    assert run_ranks(2, (word, word.replace("rank0", "rank1"), in_folder(fake)), fake) == code
    assert signaller.wait(30) == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err == said
    assert dead(fake)


def test_the_leash(fake: Path) -> None:
    """Whatever ends the parent, the children leave, also one that ignores all signals."""
    program = (
        "import signal; from icl_msr.cli import processes; from pathlib import Path; processes.MODULE = 'fake_ranks'\n"
        f"folder = Path({str(fake)!r})\n"
        "words = 'rank0=time.sleep(99)', 'rank1=signal.signal(15, signal.SIG_IGN); time.sleep(99)'\n"
        "processes.run_ranks(2, (*words, processes.in_folder(folder)), folder)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    until(lambda: len(list(fake.glob("pid-*"))) == 2, 60)
    assert not dead(fake)
    parent.kill()
    parent.wait()
    until(lambda: dead(fake), 10)


# ----------------------------------------------------------------------------------------------- the real program

TRAINING = [*DATA, *MODEL, "trainer.log_every_n_steps=1", "logger=csv", "~callbacks.online"]
MOCO = ["method=moco", "method.queue_size=20", "regularizer=msr", "regularizer.every=2", "negatives=patch"]
# Adam would turn the rounding of a gradient that is nearly zero into a whole step.
GENTLE = [
    "loader.batch_size=16",
    "optimizer=sgd",
    "optimizer.lr=0.003",
    "schedule.scale_lr=linear",
    "regularizer.lr=1e-4",
]
SHORT = [*TRAINING, *MOCO, *GENTLE, "evaluation=light", "trainer.max_epochs=2"]
LONG = [*TRAINING, "method=simclr", "regularizer=none", "evaluation=none", "trainer.max_epochs=1000"]
ONE = ["hardware=cpu", "hardware.precision=32-true"]
TWO = ["hardware=ddp", "hardware.accelerator=cpu", "hardware.precision=32-true"]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.close()


def weights(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@dataclass
class Pair:
    """The same run on one and on two ranks."""

    one: Path
    two: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    home = tmp_path_factory.mktemp("pair")
    programs = Programs(home)
    try:
        one = programs.start(*SHORT, *ONE, f"hydra.run.dir={home}/one")
        two = programs.start(*SHORT, *TWO, f"hydra.run.dir={home}/two")
        assert one.wait() == 0, one.err
        assert two.wait() == 0, two.err
        programs.gone(30)
    finally:
        programs.close()
    return Pair(home / "one", home / "two", two.out, two.err)


PARTS = ("method.backbone", "method.projector", "method.momentum_encoder", "method.queue", "regularizer.network")


def distances(one: dict[str, Any], two: dict[str, Any], beginning: dict[str, Any]) -> dict[str, float]:
    """How far two states are from each other, relative to the way that they have come."""

    def away(a: dict[str, Any], b: dict[str, Any], part: str) -> float:
        learnt = [name for name in a if name.startswith(part) and a[name].is_floating_point()]
        names = [name for name in learnt if "running" not in name]  # statistics travel farther than weights
        return math.dist(*(torch.cat([state[name].double().flatten() for name in names]).tolist() for state in (a, b)))

    return {part: away(one, two, part) / away(one, beginning, part) for part in PARTS}


def test_two_ranks_train_like_one(pair: Pair) -> None:
    """Gradients are equal to 1e-8 in float64 (`test_distributed.py`); here the whole program, in fp32.

    One rank in another memory format ends as far away: activations near zero change sign, and the meta gradient, a
    second derivative, feels it most.
    """
    one, two = weights(pair.one), weights(pair.two)
    assert one["global_step"] == two["global_step"] == 8
    apart = distances(one["state_dict"], two["state_dict"], pieces(*SHORT)[1].state_dict())
    print({part: f"{distance:.1e}" for part, distance in apart.items()})
    phi = apart.pop("regularizer.network")
    assert max(apart.values()) < 0.1, apart
    assert phi < 0.5


def test_two_ranks_log_what_one_logs(pair: Pair) -> None:
    """Numbers are averages over ranks: at the first step, whose weights are the same, they agree.

    The meta gradient is a difference quotient in fp32, so its norm agrees less well.
    """
    one, two = (read_curves(folder) for folder in (pair.one, pair.two))
    names = [name for name in one if name != "images_per_second" and not name.startswith("online/")]
    assert {"loss", "loss/msr", "msr/meta_grad_norm", "msr/variation", "negatives/similarity_own"} <= set(names)
    for name in names:
        tolerance = 5e-2 if name == "msr/meta_grad_norm" else 2e-3
        assert two[name].values[0] == pytest.approx(one[name].values[0], rel=tolerance, abs=1e-5), name


def test_accuracies_do_not_depend_on_the_number_of_ranks(pair: Pair) -> None:
    one, two = (Outcome.load(path).records.where("accuracy") for path in (pair.one, pair.two))
    assert len(one) > 4
    assert [row.value for row in two] == [row.value for row in one]


def test_two_ranks_look_like_one(pair: Pair) -> None:
    """In the folder and on the terminal."""
    names = [{str(file.relative_to(folder)) for file in folder.rglob("*")} for folder in (pair.one, pair.two)]
    assert names[0] == names[1]
    assert pair.err == ""
    lines = [line for line in pair.out.splitlines() if line]
    assert lines[0].startswith("moco-msr-patch-confounded-tiny on 2 x CPU (1 threads), 32-true")
    assert [line[:9] for line in lines if line.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert [line for line in lines if lines.count(line) > 1 and not line.startswith("on ")] == []


# ------------------------------------------------------------------------------------------ when it does not end well


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_takes_the_other_down(victim: int, programs: Programs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = programs.start(*LONG, *TWO, f"hydra.run.dir={folder}")
    until(lambda: steps(folder) > 5 or program.process.poll() is not None)
    os.kill(programs.rank(victim), signal.SIGKILL)
    began = time.monotonic()
    assert program.wait(60) == 128 + signal.SIGKILL
    programs.gone(60 - (time.monotonic() - began))
    print(f"rank {victim} was killed; all was over after {time.monotonic() - began:.1f} s")
    see = f"; see {folder}/rank-1.log" if victim else ""
    sentence = f"Rank {victim} of 2 was killed by SIGKILL (out of memory?); the run was stopped{see}."
    assert program.err.splitlines() == [sentence]
    assert not (folder / "results.json").exists()


FRAGILE = r"""
import os
from icl_msr.core.distributed import rank
from icl_msr.methods import SimCLR

class Fragile(SimCLR):
    def targets(self, views):
        self.calls = getattr(self, "calls", 0) + 1
        if rank() == int(os.environ["FRAGILE"]) and self.calls > 3:
            raise RuntimeError("the fourth step went wrong\nand this is why")
        return super().targets(views)
"""


@pytest.fixture
def fragile(tmp_path: Path) -> list[str]:
    """A method of the user's own package that fails in its fourth step."""
    package = tmp_path / "home" / "fragile"
    (package / "conf" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text(FRAGILE)
    recipe = (config_dir() / "method" / "simclr.yaml").read_text()
    (package / "conf" / "method" / "fragile.yaml").write_text(
        recipe.replace("icl_msr.methods.SimCLR", "fragile.Fragile")
    )
    return ["hydra.searchpath=[pkg://fragile.conf]", *LONG, "method=fragile"]


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_fails_takes_the_other_down(
    culprit: int, fragile: list[str], programs: Programs, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = [*fragile, *TWO, f"hydra.run.dir={folder}"]
    program = programs(*words, FRAGILE=str(culprit), PYTHONPATH=str(tmp_path / "home"))
    assert program.wait() == 1
    programs.gone(10)
    see = f"; see {folder}/rank-1.log" if culprit else ""
    *before, last = program.err.splitlines()
    said = f"Rank {culprit} of 2 failed with RuntimeError: the fourth step went wrong; the run was stopped{see}."
    assert last == said
    trace = (folder / "rank-1.log").read_text() if culprit else "\n".join(before)
    assert before == ([] if culprit else trace.splitlines())
    assert trace.count("Traceback") == 1
    assert "in targets" in trace
    assert trace.rstrip().endswith("and this is why")
    assert "Error executing job" not in program.err + trace


@pytest.mark.slow
def test_a_signal_saves_and_resume_continues_bit_for_bit(pair: Pair, programs: Programs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = programs.start(*SHORT, *TWO, f"hydra.run.dir={folder}")
    until(lambda: steps(folder) > 2 or program.process.poll() is not None)
    program.send(signal.SIGTERM)
    assert program.wait() == 75
    programs.gone(30)
    done = weights(folder)["global_step"]
    assert 2 < done < 8
    (line,) = program.err.splitlines()
    assert line.startswith(f"Stopped by SIGTERM after {done} steps; all is saved.")
    # A batch script of SLURM's, whose variables must not be taken for the ranks'.
    program = programs(f"resume={folder}", **slurm_batch(2))
    assert program.wait() == 0, program.err
    assert program.out.splitlines()[0] == f"Continuing {folder} from step {done}."
    assert program.err == ""
    programs.gone(30)
    whole, continued = weights(pair.two), weights(folder)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "loops"):
        same(whole[key], continued[key], key)
    accuracies = [Outcome.load(path).records.where("accuracy") for path in (pair.two, folder)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(pair: Pair, programs: Programs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = programs.start(*SHORT, *ONE, f"hydra.run.dir={folder}")
    until(lambda: steps(folder) > 2 or program.process.poll() is not None)
    program.send(signal.SIGTERM)
    assert program.wait() == 75
    program = programs(f"resume={folder}", "hardware.devices=2")
    assert program.wait() == 0, program.err
    programs.gone(30)
    _, module, _ = pieces(*SHORT, *ONE)
    whole, continued = weights(pair.one), weights(folder)
    assert continued["global_step"] == whole["global_step"]
    apart = distances(whole["state_dict"], continued["state_dict"], module.state_dict())
    assert apart.pop("regularizer.network") < 0.5
    assert max(apart.values()) < 0.1, apart


def test_a_signal_in_the_evaluation_is_answered_as_in_training(programs: Programs, tmp_path: Path) -> None:
    """And the evaluation is done by the command that it names."""
    folder = tmp_path / "run"
    slow = ["evaluation=default", "evaluation.probe_epochs=100000", "evaluation.untrained=false"]
    short = ["trainer.max_epochs=1", "method=simclr", "regularizer=none", "evaluation.learning_rates=[1e-3]"]
    program = programs.start(*TRAINING, *slow, *short, f"hydra.run.dir={folder}")
    until(lambda: (folder / "encoder.json").exists() or program.process.poll() is not None)
    program.send(signal.SIGTERM)
    assert program.wait() == 75, program.err
    said = f"Stopped by SIGTERM; all is saved. Continue with: python -m icl_msr.run resume={folder}\n"
    assert program.err == said
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("lines", [0, 2])
def test_a_run_outlives_the_reader_of_its_output(lines: int, programs: Programs, tmp_path: Path) -> None:
    """As of `| head`: what it prints goes nowhere, and all else is done."""
    folder = tmp_path / "run"
    short = ["trainer.max_epochs=1", "method=simclr", "regularizer=none", "evaluation=none"]
    program = programs.start(*TRAINING, *short, f"hydra.run.dir={folder}", out=subprocess.PIPE)
    assert program.process.stdout is not None
    read = [program.process.stdout.readline() for _ in range(lines)]
    program.process.stdout.close()
    assert program.wait() == 0, program.err
    assert program.err == ""
    assert all(read)
    assert (folder / "report.html").exists()


RACE = """
import os, sys
import icl_msr.run as R
words = sys.argv[1:]
first = os.fork() == 0
sys.argv = ["icl_msr.run", *words, "seed=0" if first else "seed=1"]
code = R.main()
if not first:
    os.wait()
print("code", code, flush=True)
os._exit(code)
"""


def test_a_new_folder_has_no_other_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Footprint, "made", [])
    names = [new_folder(f"{tmp_path}/a/b") for _ in range(3)]
    assert names == [f"{tmp_path}/a/b", f"{tmp_path}/a/b-2", f"{tmp_path}/a/b-3"]
    Path(names[1], "file").touch()
    Footprint.erase()
    assert [str(path) for path in tmp_path.rglob("*")] == [f"{tmp_path}/a", names[1], f"{names[1]}/file"]
    (tmp_path / "c").touch()
    assert new_folder(f"{tmp_path}/c/d") == f"{tmp_path}/c/d"  # Hydra then says that it cannot be made


@pytest.mark.slow
def test_two_seeds_that_start_together_are_never_mixed(programs: Programs, tmp_path: Path) -> None:
    """In one folder, the second is refused, also after the first has ended; without a folder, each has its own."""
    (tmp_path / "race.py").write_text(RACE)
    short = [*TRAINING, "trainer.max_epochs=1", "method=simclr", "regularizer=none", "evaluation=none"]
    both = programs.start(*short, "hydra.run.dir=same", module="race", PYTHONPATH=f"{tmp_path}:{CHECKOUT}")
    both.wait()
    assert sorted(line for line in both.out.splitlines() if line.startswith("code")) == ["code 0", "code 2"]
    (line,) = both.err.splitlines()
    (seed,) = re.findall(r"same holds a run with seed=(\d), and \d was asked for", line)
    config = (tmp_path / "same" / "config.yaml").read_text()
    assert f"seed: {seed}\n" in config
    assert Outcome.load(tmp_path / "same").seed == int(seed)
    assert "Continuing" not in both.out

    apart = programs.start(*short, module="race", PYTHONPATH=f"{tmp_path}:{CHECKOUT}")
    assert apart.wait() == 0, apart.err
    folders = list((tmp_path / "runs").glob("*/*"))
    assert sorted(Outcome.load(folder).seed for folder in folders) == [0, 1]


@pytest.mark.slow
def test_ctrl_c_while_the_ranks_start(programs: Programs, tmp_path: Path) -> None:
    """No traceback of whatever module was being imported."""
    program = programs.start(*LONG, *TWO, f"hydra.run.dir={tmp_path}/run")
    programs.rank(1)
    time.sleep(1)
    program.send(signal.SIGINT)
    assert program.wait() == 75
    (line,) = program.err.splitlines()
    assert line.startswith("Stopped by SIGINT")
    programs.gone(30)


@pytest.mark.slow
def test_ranks_do_not_outlive_their_parent(programs: Programs, tmp_path: Path) -> None:
    program = programs.start(*LONG, *TWO, f"hydra.run.dir={tmp_path}/run")
    until(lambda: steps(tmp_path / "run") > 2 or program.process.poll() is not None)
    assert len(programs.alive()) >= 3
    program.send(signal.SIGKILL)
    program.wait()
    print(f"the parent was killed; all was over after {programs.gone(30):.1f} s")


@pytest.mark.slow
def test_ranks_that_others_start(pair: Pair, programs: Programs, tmp_path: Path) -> None:
    """As torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        programs.start(*SHORT, *TWO, f"hydra.run.dir={folder}", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(2)
    ]
    assert [program.wait() for program in ranks] == [0, 0], [program.err for program in ranks]
    assert [program.err for program in ranks] == ["", ""]
    assert ranks[1].out == ""
    same(weights(pair.two)["state_dict"], weights(folder)["state_dict"])
    programs.gone(30)


@pytest.mark.slow
def test_torchrun_starts_ranks_again(programs: Programs, tmp_path: Path) -> None:
    """With `--max-restarts`, they continue from the checkpoint."""
    words = [*TRAINING, "method=simclr", "regularizer=none", "evaluation=none", "trainer.max_epochs=4", *TWO]
    slowly = "+callbacks.slowly._target_=support.slowly.Slowly"
    path = f"{CHECKOUT}:{CHECKOUT / 'tests'}"
    whole = programs.start(*words, slowly, f"hydra.run.dir={tmp_path}/whole", PYTHONPATH=path)
    assert whole.wait() == 0, whole.err
    folder = tmp_path / "run"
    torchrun = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "icl_msr.run"]
    command = [*torchrun, *words, slowly, f"hydra.run.dir={folder}"]
    program = programs.start(*command, module="torch.distributed.run", PYTHONPATH=path, SLOWLY="0.4")
    until(lambda: steps(folder) > 10 or program.process.poll() is not None)
    os.kill(programs.rank(1), signal.SIGKILL)
    assert program.wait() == 0, program.err
    assert f"Continuing {folder} from step 8." in program.out
    same(weights(tmp_path / "whole")["state_dict"], weights(folder)["state_dict"])
    programs.gone(30)
