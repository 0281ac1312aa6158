"""Sweeps: jobs as processes, each with its folder and exit code, and nothing that is done is done again."""

import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from support.inprocess import loggers_put_back
from support.programs import Programs, steps, until
from support.tiny import DATA, MODEL
from support.uploads import sent

import icl_msr
from icl_msr.cli import arrays, processes, sweeps
from icl_msr.cli.command import Job, main
from icl_msr.cli.job import run
from icl_msr.cli.processes import clean_environment, in_folder
from icl_msr.cli.sweeps import checked_job, job_type, run_name, sweep_folder
from icl_msr.core.config import config_dir
from icl_msr.core.folder import RunFolder
from icl_msr.core.saved import as_yaml

# ---------------------------------------------------------------------------------------------- jobs without a program

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
from icl_msr.cli.processes import hold_leash

hold_leash()
*words, last = sys.argv[1:]
folder = Path(last.partition("=")[2].strip("'"))
seed = next(word.partition("=")[2] for word in words if word.startswith("seed="))
(folder / "environment").write_text(json.dumps(dict(os.environ)))
with (folder / "began").open("a") as file:
    file.write(f"{time.monotonic()} ")
print(f"job {seed} at work", flush=True)
exec(os.environ.get(f"JOB{seed}", ""))

(folder / "config.yaml").write_text(Path(os.environ["CONFIGS"], folder.name).read_text())
(folder / "results.json").write_text(json.dumps({"seed": 0, "metric": {"name": "a", "value": float(seed) / 10}}))
"""


class Answer(NamedTuple):
    code: int
    out: list[str]
    err: list[str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """`python -m icl_msr.run -m` in this process, with jobs that are done at once. `JOB<seed>` is their trouble."""
    home, configs = tmp_path / "home", tmp_path / "configs"
    home.mkdir()
    configs.mkdir()
    (home / "fake_job.py").write_text(FAKE)

    def noted(context: HydraContext, sweep: DictConfig, overrides: Sequence[str], number: int) -> DictConfig:
        config = checked_job(context, sweep, overrides, number)
        task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        (configs / str(number)).write_text(as_yaml(task))  # as a run does; composing again takes a second
        return config

    monkeypatch.setattr(sweeps, "checked_job", noted)
    monkeypatch.setenv("CONFIGS", str(configs))
    for name in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(home))
    monkeypatch.setattr(processes, "MODULE", "fake_job")
    monkeypatch.setattr(sys, "argv", ["icl_msr.run"])
    monkeypatch.chdir(tmp_path)

    def call(*words: str, job: Job = run) -> Answer:
        try:
            code = main(job, ["-m", *words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Answer(code, out.splitlines(), err.splitlines())

    with loggers_put_back():
        yield call


def began(folder: Path) -> int:
    """How often a job has been started."""
    return len((folder / "began").read_text().split()) if (folder / "began").exists() else 0


def only(root: Path) -> Path:
    """The only sweep below."""
    (folder,) = (root / "runs" / "sweeps").iterdir()
    return folder


PROCESS = "hydra/launcher=process"


def test_every_job_has_its_folder(command: Any, tmp_path: Path) -> None:
    answer = command("seed=1,2", "method=simclr", PROCESS)
    assert answer.code == 0
    assert answer.err == []
    folder = only(tmp_path).relative_to(tmp_path)
    first, second = (f"[{i}/2] seed={i}: " for i in (1, 2))
    assert answer.out[0:2] == [f"{first}{folder}/0", "job 1 at work"]
    assert re.fullmatch(re.escape(first) + r"metric 0\.1000 after 0:00:\d\d; about 0:00:\d\d left", answer.out[2])
    assert answer.out[3:5] == [f"{second}{folder}/1", "job 2 at work"]
    assert re.fullmatch(re.escape(second) + r"metric 0\.2000 after 0:00:\d\d", answer.out[5])
    assert answer.out[6:] == [f"Jobs done: 2 of 2. Compare them: python -m icl_msr.report {folder}"]
    for job in "01":
        told = json.loads((folder / job / "environment").read_text())
        assert told["WANDB_RUN_GROUP"] == folder.name
        assert told["WANDB_JOB_TYPE"] == "method=simclr"
        assert not (folder / job / "job.log").exists()


def test_a_job_that_fails_stops_no_other(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("seed=1,2,3", PROCESS)
    monkeypatch.setenv("JOB1", "sys.exit('the disk is on fire')")
    monkeypatch.setenv("JOB2", "os.kill(os.getpid(), signal.SIGKILL)")
    answer = command(*words)
    folder = only(tmp_path)
    assert answer.code == 128 + signal.SIGKILL
    assert answer.err == ["the disk is on fire"]
    assert [RunFolder(folder / job).done for job in "012"] == [False, False, True]
    assert any(line.startswith("[1/3] seed=1: exit code 1 after") for line in answer.out)
    assert any(line.startswith("[2/3] seed=2: exit code 137 after") for line in answer.out)
    assert answer.out[-1].startswith("Jobs done: 1 of 3; the same command finishes the others. Compare")
    assert not json.loads((folder / "sweep.json").read_text())["finished"]

    # Again: only what is missing, in the same folder.
    monkeypatch.delenv("JOB1")
    monkeypatch.delenv("JOB2")
    before = (folder / "2" / "results.json").stat().st_mtime_ns
    answer = command(*words)
    assert (answer.code, answer.err) == (0, [])
    assert only(tmp_path) == folder
    relative = folder.relative_to(tmp_path)
    assert answer.out[0] == f"Continuing {relative}; jobs done so far: 1."
    assert [line for line in answer.out if "done before" in line] == [f"[3/3] seed=3: done before, {relative}/2"]
    assert [began(folder / job) for job in "012"] == [2, 2, 1]
    assert (folder / "2" / "results.json").stat().st_mtime_ns == before
    assert json.loads((folder / "sweep.json").read_text())["finished"]


def test_another_job_in_a_folder_is_not_taken_for_done(command: Any, tmp_path: Path) -> None:
    assert command("seed=1,2", PROCESS, "hydra.sweep.dir=here").code == 0
    assert command("seed=1,3", PROCESS, "hydra.sweep.dir=here").code == 0
    assert [began(tmp_path / "here" / job) for job in "01"] == [1, 2]


def test_jobs_side_by_side(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in "12":
        other = tmp_path / "here" / str(2 - int(seed)) / "began"
        monkeypatch.setenv(f"JOB{seed}", f"while not os.path.exists({str(other)!r}): time.sleep(0.02)")
    answer = command("seed=1,2", PROCESS, "hydra.launcher.jobs=2", "hydra.sweep.dir=here")
    assert answer.code == 0
    assert [(tmp_path / "here" / job / "job.log").read_text() for job in "01"] == ["job 1 at work\n", "job 2 at work\n"]
    assert not any("at work" in line for line in answer.out)
    threads = json.loads((tmp_path / "here" / "0" / "environment").read_text())["OMP_NUM_THREADS"]
    assert int(threads) >= 1


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_jobs_side_by_side_are_a_number(jobs: str, command: Any) -> None:
    code, out, err = command("seed=1", PROCESS, f"hydra.launcher.jobs={jobs}")
    assert (code, out) == (2, [])
    assert err == [f"hydra.launcher.jobs={jobs} is not allowed; it should be a whole number, at least 1."]


def test_a_signal_ends_the_sweep_after_its_jobs(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that saves itself and one that cannot yet; those that wait are not begun."""
    for trouble in ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); ", ""):
        folder = tmp_path / f"sweep{len(trouble)}"
        monkeypatch.setenv("JOB1", f"{trouble}os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)")
        answer = command("seed=1,2", PROCESS, f"hydra.sweep.dir={folder}")
        assert answer.code == 75
        assert answer.err == ["The sweep was stopped; the same command continues it."]
        assert [began(folder / job) for job in "01"] == [1, 0]
        assert not json.loads((folder / "sweep.json").read_text())["finished"]


class Climber(Sweeper):
    """Asks for one job at a time, the next seed as long as that is better."""

    def __init__(self, most: int):
        self.most, self.seen = most, list[float]()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.launcher: Any = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Sequence[float]:
        for number in range(self.most):
            (answer,) = self.launcher.launch([[*arguments, f"seed={number}"]], initial_job_idx=number)
            self.seen.append(answer.return_value)
            if math.isnan(self.seen[-1]):
                break
        (Path("seen.json")).write_text(json.dumps(self.seen))
        return self.seen


def test_metrics_reach_the_sweeper(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Climber, "__module__", "hydra_plugins.test")
    monkeypatch.setattr(Plugins, "_instantiate", instantiate(Plugins._instantiate))
    monkeypatch.setenv("JOB2", "sys.exit(1)")
    answer = command(
        "method=simclr", PROCESS, "hydra.sweep.dir=here", "hydra.sweeper._target_=climber", "+hydra.sweeper.most=5"
    )
    assert answer.code == 1, answer.err
    assert str(json.loads((tmp_path / "seen.json").read_text())) == "[0.0, 0.1, nan]"
    assert [line for line in answer.out if line.endswith("here/1")] == ["[2/2] seed=1: here/1"]


def instantiate(theirs: Any) -> Callable[..., Any]:
    def ours(self: Any, config: DictConfig) -> Any:
        return Climber(config.most) if config._target_ == "climber" else theirs(self, config)

    return ours


# -------------------------------------------------------------------------------------------------- folders and names


def record(root: Path, name: str, command: list[str], finished: bool) -> str:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"command": command, "finished": finished}))
    return str(folder)


def test_a_sweep_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, mine = tmp_path / "sweeps", ["-m", "seed=0,1"]
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", *mine])
    new = Path(sweep_folder(str(root)))
    assert new.parent == root
    assert list(new.iterdir()) == []
    assert sweep_folder(str(root)) != str(new)  # also within the same second
    record(root, "2026-01-01_00-00-00", mine, finished=True)
    record(root, "2026-01-03_00-00-00", ["-m", "seed=0,1,2"], finished=False)
    assert sweep_folder(str(root)) > f"{root}/2026-01-04"
    begun = record(root, "2026-01-02_00-00-00", mine, finished=False)
    assert sweep_folder(str(root)) == begun
    lock = os.open(begun, os.O_RDONLY)
    assert sweeps._locks(lock)  # it runs
    assert sweep_folder(str(root)) > f"{root}/2026-01-04"
    os.close(lock)
    assert sweep_folder(str(root)) == begun
    lock = os.open(begun, os.O_RDONLY)
    assert sweeps._locks(lock, fcntl.LOCK_SH)
    assert sweep_folder(str(root)) > f"{root}/2026-01-04"  # it runs, and its jobs are not shared
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", *mine, PROCESS])
    shared = record(root, "2026-01-05_00-00-00", [*mine, PROCESS], finished=False)
    other = os.open(shared, os.O_RDONLY)
    assert sweeps._locks(other, fcntl.LOCK_SH)
    assert sweep_folder(str(root)) == shared
    os.close(lock)
    os.close(other)


def test_two_sweeps_do_not_share_a_folder(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "PATIENCE", 0.1)
    (tmp_path / "here").mkdir()
    lock = os.open(tmp_path / "here", os.O_RDONLY)
    assert sweeps._locks(lock)
    code, out, err = command("seed=1,2", PROCESS, "hydra.sweep.dir=here")
    os.close(lock)
    assert (code, out) == (2, [])
    assert err == ["here is another process's sweep; wait for its end, or choose another hydra.sweep.dir."]
    assert list((tmp_path / "here").iterdir()) == []


OTHER = """
import fcntl, json, os, sys
folder, claimed = sys.argv[1], int(sys.argv[2])
with open(os.path.join(folder, "sweep.json"), "w") as file:
    json.dump({"command": sys.argv[3:], "finished": False}, file)
fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
claims = os.open(os.path.join(folder, "claims"), os.O_RDWR | os.O_CREAT)
fcntl.lockf(claims, fcntl.LOCK_EX, 1, claimed)
print("ready", flush=True)
if sys.stdin.readline() == "fail\\n":
    os.pwrite(claims, b"1", claimed)
"""


@pytest.mark.parametrize("end", ["dies", "fail"])
def test_the_same_command_elsewhere_shares_the_jobs(
    end: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of a process that has died is taken over, and one that has failed is not repeated."""
    monkeypatch.setattr(sweeps, "PAUSE", 0.01)
    here = tmp_path / "here"
    here.mkdir()
    words = ["seed=1,2,3", "method=simclr", PROCESS, "hydra.sweep.dir=here"]
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(here), "0", "-m", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    until_last = f"until [ -f {here}/2/results.json ]; do sleep 0.05; done; sleep 0.3; "
    finish = f"kill -9 {other.pid}" if end == "dies" else "echo fail"
    subprocess.Popen(["bash", "-c", until_last + finish], stdout=other.stdin)
    answer = command(*words)
    other.communicate()
    assert answer.err == []
    assert answer.out[0] == "Joining here, which another process has begun."
    ends = [line for line in answer.out if re.search("metric|failed", line)]
    assert [line[:20] for line in ends[:2]] == ["[2/3] seed=2: metric", "[3/3] seed=3: metric"]
    if end == "dies":
        assert answer.code == 0
        assert ends[2].startswith("[1/3] seed=1: metric 0.1000")
    else:
        assert answer.code == 1
        assert ends[2] == "[1/3] seed=1: failed in another process, here/0"
        assert command(*words).code == 0  # nobody else is there now, so it is tried again
    assert [began(here / job) for job in "012"] == [1, 1, 1]


def test_only_the_same_command_joins(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "PATIENCE", 0.1)
    record(tmp_path, "here", ["-m", "seed=1,2", PROCESS, "hydra.sweep.dir=here"], finished=False)
    lock = os.open(tmp_path / "here", os.O_RDONLY)
    assert sweeps._locks(lock, fcntl.LOCK_SH)
    assert command("seed=1,3", PROCESS, "hydra.sweep.dir=here").code == 2
    assert command("seed=1,2", "hydra.sweep.dir=here").code == 2
    os.close(lock)


def test_a_sweep_is_no_rank(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = command("seed=1,2", PROCESS)
    assert (code, out) == (2, [])
    assert err == ["A sweep is started once, and 2 processes were; add hydra/launcher=process instead."]
    assert not (tmp_path / "runs").exists()


def test_several_devices_need_processes(command: Any) -> None:
    words = ("seed=0,1", *DATA, *MODEL, "hardware=ddp", "hardware.accelerator=cpu", "hydra.sweep.dir=here")
    code, out, err = command(*words)
    assert code == 2
    assert err == ["A sweep over several devices needs processes of its own for each job; add hydra/launcher=process."]
    assert not [line for line in out if "epoch" in line]


def test_what_a_run_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_JOB_TYPE", raising=False)
    fixed = ["dataset.train=64", "trainer.max_epochs=1"]
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", "-m", *fixed, "method=simclr,moco", "seed=0,1"])
    assert job_type([*fixed, "method=moco", "seed=1"]) == "method=moco"  # what the sweep changes
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", "-m", *fixed, "seed=0,1"])
    assert job_type([*fixed, "seed=1"]) == "dataset.train=64,trainer.max_epochs=1"
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", *fixed, "seed=1"])
    assert job_type([*fixed, "seed=1"]) == "dataset.train=64,trainer.max_epochs=1"
    assert job_type(["seed=1"]) is None
    assert job_type([]) is None
    long = [job_type([f"a={'b' * 99}{end}"]) for end in "cd"]
    assert long[0] != long[1]
    assert all(name and len(name) == 64 and name.startswith(f"a={'b' * 53}") for name in long)
    monkeypatch.setenv("WANDB_JOB_TYPE", "baseline")
    assert job_type([*fixed, "seed=1"]) == "baseline"


CHOICES = {"method": "moco", "regularizer": "msr", "negatives": "none", "dataset": "confounded", "backbone": "tiny"}
CALLED = "moco-msr-none-confounded-tiny"


@pytest.mark.parametrize(
    ("typed", "job", "name"),
    [
        (
            ["-m", "regularizer.lam=1,2", "seed=0,1"],
            ["regularizer.lam=2", "seed=1"],
            f"{CALLED} regularizer.lam=2 seed=1",
        ),
        (["-m", "method=moco,byol", "seed=1"], ["method=moco", "seed=1"], f"{CALLED} seed=1"),
        (["-m", "seed=0,1", "trainer.max_epochs=1"], ["seed=1", "trainer.max_epochs=1"], f"{CALLED} seed=1"),
        (["regularizer.lam=2"], ["regularizer.lam=2"], f"{CALLED} seed=1"),
    ],
)
def test_a_run_is_named_after_what_its_sweep_varies(
    typed: list[str], job: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", *typed])
    assert run_name(CHOICES, job, 1) == name
    monkeypatch.setenv("ICL_MSR_SWEPT", "optimizer.lr=0.1")  # of the process that started the job
    assert run_name(CHOICES, job, 1) == f"{CALLED} optimizer.lr=0.1 seed=1"
    monkeypatch.setenv("ICL_MSR_SWEPT", "a" * 200)
    assert len(run_name(CHOICES, job, 12)) == 128
    assert run_name(CHOICES, job, 12).endswith(" seed=12")


def test_a_run_of_an_agent_is_named_after_what_the_server_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "config.yaml"
    chosen.write_text("wandb_version: 1\n\nmethod.temperature:\n  value: 0.1\nseed:\n  value: 3\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(chosen))
    words = ["trainer.max_epochs=1", "method.temperature=0.1", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["icl_msr.run", *words])
    assert run_name(CHOICES, words, 3) == f"{CALLED} method.temperature=0.1 seed=3"
    assert job_type(words) == "method.temperature=0.1"


# --------------------------------------------------------------------------------------------- jobs as a SLURM array

SCHEDULER = {
    # runs the tasks of an array at once, one after the other, and notes their states
    "sbatch": r"""#!/bin/bash
    file="${@: -1}"; number=$(($(cat "$STATES/last" 2>/dev/null || echo 40) + 1)); echo $number >"$STATES/last"
    tasks=$(sed -n 's/^#SBATCH --array=\([0-9,]*\).*/\1/p' "$file")
    for task in ${tasks//,/ }; do
      if [ "$LATER" ]; then state=PENDING
      elif SLURM_ARRAY_TASK_ID=$task bash "$file"; then state=COMPLETED; else state=FAILED; fi
      echo "$task $state" >>"$STATES/$number"
    done
    echo "$number" """,
    "squeue": r"""#!/bin/bash
    for word; do
      if [[ $word == --jobs=* ]]; then for number in ${word//[^0-9]/ }; do cat "$STATES/$number"; done; fi
    done """,
    "srun": r"""#!/bin/bash
    while [[ $1 == --* ]]; do shift; done; exec "$@" """,
}
SLURM = "hydra/launcher=slurm"


@pytest.fixture
def scheduler(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands with the names of SLURM's, and the folder where they note the states of jobs."""
    programs, states = tmp_path / "bin", tmp_path / "states"
    programs.mkdir()
    states.mkdir()
    for name, script in SCHEDULER.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STATES", str(states))
    monkeypatch.setattr(arrays, "PAUSE", 0.01)
    monkeypatch.setattr(arrays, "_LATE", 0.1)
    return states


def test_an_array_says_what_each_task_does(command: Any, scheduler: Path, tmp_path: Path) -> None:
    own = ["hydra.launcher.time=4:00:00", "+hydra.launcher.exclude=n3", "hydra.launcher.at_once=2"]
    answer = command("seed=1,2", "method=simclr", SLURM, *own, "hydra.launcher.setup='module load cuda'")
    assert (answer.code, answer.err) == (0, [])
    folder = only(tmp_path)
    script = (folder / "array-0.sh").read_text().splitlines()
    options = [line.partition(" --")[2] for line in script if line.startswith("#SBATCH")]
    assert options[:5] == [f"job-name={folder.name}", "array=0,1%2", "nodes=1", "ntasks-per-node=1", "requeue"]
    assert options[5:] == ["output=/dev/null", "time=4:00:00", "signal=USR1@120", "exclude=n3"]
    start = script.index("case $SLURM_ARRAY_TASK_ID in")
    group = f"WANDB_RUN_GROUP={folder.name} WANDB_JOB_TYPE=method=simclr"
    run_dir = shlex.quote(in_folder(folder.relative_to(tmp_path) / "0"))
    assert script[start + 1] == f"0) export {group}; folder={folder}/0; set -- seed=1 method=simclr {run_dir} ;;"
    assert script[start + 3 :] == [
        *("esac", 'exec >>"$folder/job.log" 2>&1', "module load cuda"),
        f'srun --kill-on-bad-exit=1 {sys.executable} -m fake_job "$@"',
    ]


def test_an_array_is_followed_and_continued(
    command: Any, scheduler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that fails stops no other, and the same command submits that job alone."""
    monkeypatch.setenv("JOB2", "sys.exit(1)")
    words = ("seed=1,2,3", "method=simclr", SLURM)
    answer = command(*words)
    folder = only(tmp_path).relative_to(tmp_path)
    titles = [f"[{i}/3] seed={i}: " for i in (1, 2, 3)]
    script = tmp_path / folder / "array-0.sh"
    assert answer.out == [
        f"Submitted 3 jobs as SLURM job 41; its script is {script}.",
        *(f"{titles[0]}metric 0.1000", f"{titles[1]}FAILED, see {folder}/1/job.log", f"{titles[2]}metric 0.3000"),
        f"Jobs done: 2 of 3; the same command finishes the others. Compare them: python -m icl_msr.report {folder}",
    ]
    assert (answer.code, answer.err) == (1, [])
    assert (folder / "1" / "job.log").read_text() == "job 2 at work\n"

    monkeypatch.delenv("JOB2")
    answer = command(*words)
    assert answer.code == 0
    assert "#SBATCH --array=1\n" in (folder / "array-1.sh").read_text()
    assert answer.out[-2:] == [
        f"{titles[1]}metric 0.2000",
        f"Jobs done: 3 of 3. Compare them: python -m icl_msr.report {folder}",
    ]
    assert [began(folder / job) for job in "012"] == [1, 2, 1]


def test_an_array_that_goes_on_is_not_submitted_twice(
    command: Any, scheduler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATER", "1")
    words = ("seed=1,2", "method=simclr", SLURM, "hydra.launcher.follow=false", f"hydra.sweep.dir={tmp_path}/sweep")
    answer = command(*words)
    assert (answer.code, answer.err) == (0, [])
    assert answer.out[1] == "SLURM has the jobs as SLURM job 41; the same command, with follow=true, waits for them."
    assert command(*words).out[-2:-1] == answer.out[1:2]
    assert (scheduler / "last").read_text() == "41\n"
    # One has ended meanwhile, and only the other one is missing.
    (scheduler / "41").write_text("0 PENDING\n1 CANCELLED\n")
    assert "as SLURM jobs 41, 42;" in command(*words).out[-2]
    assert (scheduler / "42").read_text() == "1 PENDING\n"


def test_jobs_of_several_sizes_are_no_array(command: Any, scheduler: Path) -> None:
    answer = command("hardware=cpu,ddp", "method=simclr", SLURM)
    assert answer.code == 2
    assert answer.err == [
        "The tasks of an array of SLURM have the same size, and these jobs have several values of hardware; "
        "type a command for each."
    ]


def test_a_machine_without_slurm_is_refused(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = command("seed=1,2", "method=simclr", SLURM)
    assert answer.code == 2
    assert answer.err == [
        "hydra/launcher=slurm needs sbatch, which is not on this machine; type hydra/launcher=process."
    ]


# ----------------------------------------------------------------------------------------------------- the real program

TRAINING = [*DATA, *MODEL, "trainer.log_every_n_steps=1", "callbacks.online.every_n_epochs=1", "evaluation=none"]
SIMPLE = [*TRAINING, "method=simclr", "regularizer=none", "logger=csv"]


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.close()


def test_a_sweep_of_processes(programs: Programs, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = [
        "-m",
        *SIMPLE,
        "trainer.max_epochs=1",
        "seed=0,1",
        PROCESS,
        "hydra.launcher.jobs=2",
        f"hydra.sweep.dir={folder}",
    ]
    program = programs(*words)
    assert program.wait() == 0, program.err
    assert program.err == ""
    values = [RunFolder(folder / job).metric() for job in "01"]
    assert not any(map(math.isnan, values))
    for number, value in enumerate(values):
        (line,) = [line for line in program.out.splitlines() if f"[{number + 1}/2] seed={number}: metric" in line]
        assert f"metric {value:.4f} after" in line
        assert "epoch 1/1" in (folder / str(number) / "job.log").read_text()
    assert program.out.splitlines()[-1] == f"Jobs done: 2 of 2. Compare them: python -m icl_msr.report {folder}"
    programs.gone(30)


@pytest.mark.slow
def test_a_mistake_in_one_job(programs: Programs, tmp_path: Path) -> None:
    """The others are run; again, they are left alone."""
    folder = tmp_path / "sweep"
    words = [
        "-m",
        *SIMPLE,
        "trainer.max_epochs=1",
        "loader.batch_size=1000000,16",
        PROCESS,
        f"hydra.sweep.dir={folder}",
    ]
    for attempt in range(2):
        program = programs(*words)
        assert program.wait() == 2
        sentence = "loader.batch_size=1000000 is larger than the training split; set it to 64 or less."
        assert program.err.splitlines() == [sentence]
        assert "[1/2] loader.batch_size=1000000: exit code 2 after" in program.out
        assert (f"[2/2] loader.batch_size=16: done before, {folder}/1" in program.out) == bool(attempt)
        assert "Jobs done: 1 of 2; the same command finishes the others." in program.out


@pytest.mark.slow
def test_two_commands_share_a_sweep(programs: Programs, tmp_path: Path) -> None:
    """One of them is killed, and the other takes over what it has claimed."""
    short = [*DATA, *MODEL, "method=simclr", "regularizer=none", "evaluation=none", "logger=csv", "~callbacks.online"]
    own = ["trainer.max_epochs=3", "trainer.log_every_n_steps=1", "metric=loss", "hardware=cpu"]
    slowly = "+callbacks.slowly._target_=support.slowly.Slowly"
    words = ["-m", "seed=0,1,2", PROCESS, *short, *own, slowly, f"hydra.sweep.dir={tmp_path}/here"]
    path = os.pathsep.join(str(Path(icl_msr.__file__).parents[1] / name) for name in (".", "tests"))
    first = programs.start(*words, SLOWLY="4", PYTHONPATH=path)
    until(lambda: steps(tmp_path / "here" / "0") > 1 or first.process.poll() is not None)
    second = programs.start(*words, PYTHONPATH=path)
    until(lambda: steps(tmp_path / "here" / "1") > 1 or second.process.poll() is not None)
    first.send(signal.SIGKILL)
    assert second.wait() == 0, second.err
    lines = second.out.splitlines()
    assert lines[0] == f"Joining {tmp_path}/here, which another process has begun."
    begun = [line[:14] for line in lines if re.fullmatch(r"\[\d/3\] seed=\d: \S+/here/\d", line)]
    assert begun == ["[2/3] seed=1: ", "[3/3] seed=2: ", "[1/3] seed=0: "]
    assert lines[-1].startswith("Jobs done: 3 of 3.")
    programs.gone(30)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["process", "serial"])
def test_a_sweep_that_was_killed_goes_on(launcher: str, programs: Programs, tmp_path: Path) -> None:
    """In its second job, which continues from its checkpoint; the first is not done again."""
    words = ["-m", *SIMPLE, "trainer.max_epochs=12", "seed=0,1,2", f"hydra/launcher={launcher}"]
    program = programs.start(*words)
    root = tmp_path / "runs" / "sweeps"
    until(lambda: (root.exists() and steps(next(root.iterdir()) / "1") > 20) or program.process.poll() is not None)
    program.send(signal.SIGKILL)
    program.wait()
    programs.gone(30)
    folder = only(tmp_path)
    assert RunFolder(folder / "0").done
    assert RunFolder(folder / "1").checkpoint.exists()
    assert not RunFolder(folder / "1").done
    before = (folder / "0" / "results.json").read_text()
    program = programs(*words)
    assert program.wait() == 0, program.err
    assert only(tmp_path) == folder
    relative = folder.relative_to(tmp_path)
    assert program.out.splitlines()[0] == f"Continuing {relative}; jobs done so far: 1."
    assert f"Continuing {folder}/1 from step" in program.out
    assert program.out.splitlines()[-1] == f"Jobs done: 3 of 3. Compare them: python -m icl_msr.report {relative}"
    assert (folder / "0" / "results.json").read_text() == before
    assert program.out.count("epoch 12/12") == 2
    programs.gone(30)


FRAGILE = """
from pathlib import Path
from icl_msr.core.distributed import rank
from icl_msr.methods import SimCLR

class Fragile(SimCLR):
    def targets(self, views):
        if rank() == 1 and Path("trouble").exists() and self.training and self.steps() > 9:
            raise RuntimeError("trouble in the second epoch")
        return super().targets(views)

    def steps(self):
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls
"""


@pytest.mark.slow
def test_a_sweep_of_runs_on_several_devices(programs: Programs, tmp_path: Path) -> None:
    """Two methods, two seeds, two ranks each, with W&B; one method fails on purpose. -s prints the table."""
    package = tmp_path / "home" / "fragile"
    (package / "conf" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text(FRAGILE)
    recipe = (config_dir() / "method" / "simclr.yaml").read_text()
    (package / "conf" / "method" / "fragile.yaml").write_text(
        recipe.replace("icl_msr.methods.SimCLR", "fragile.Fragile")
    )
    (tmp_path / "trouble").touch()
    words = [
        *("-m", "hydra.searchpath=[pkg://fragile.conf]", *TRAINING, "logger=wandb", "trainer.max_epochs=2"),
        *("hardware=ddp", "hardware.accelerator=cpu", "regularizer=msr", "negatives=patch", PROCESS),
        *("method=moco,byol,simclr,fragile", "seed=0"),
    ]
    environment = {"PYTHONPATH": str(package.parent), "WANDB_MODE": "offline"}
    program = programs(*words, **environment)
    folder = only(tmp_path)
    show("First time", program.wait(), program.out, program.err, folder)
    assert program.wait() == 1
    assert program.err.splitlines() == [
        "Rank 1 of 2 failed with RuntimeError: trouble in the second epoch; the run was stopped; "
        f"see {folder}/3/rank-1.log."
    ]
    found = [sent(folder / job) for job in "0123"]
    assert [len(runs) for runs in found] == [1, 1, 1, 1]
    assert [runs[0].exit_code for runs in found] == [0, 0, 0, 1]
    methods = ("moco", "byol", "simclr", "fragile")
    assert [runs[0].run.job_type for runs in found] == [f"method={name}" for name in methods]
    assert {runs[0].run.run_group for runs in found} == {folder.name}
    assert len({runs[0].run.run_id for runs in found}) == 4
    programs.gone(60)

    (tmp_path / "trouble").unlink()
    untouched = [(folder / job / "results.json").stat().st_mtime_ns for job in "012"]
    program = programs(*words, **environment)
    show("The same command again", program.wait(), program.out, program.err, folder)
    assert program.wait() == 0, program.err
    assert [(folder / job / "results.json").stat().st_mtime_ns for job in "012"] == untouched
    assert program.out.count("done before") == 3
    assert f"Continuing {folder}/3 from step 8." in program.out
    found = [sent(folder / job) for job in "0123"]
    assert [[run.exit_code for run in runs] for runs in found] == [[0], [0], [0], [1, 0]]
    assert len({run.run.run_id for run in found[3]}) == 1  # W&B appends to the run that it knows
    assert json.loads((folder / "sweep.json").read_text())["finished"]
    programs.gone(60)


def show(title: str, code: int, out: str, err: str, folder: Path) -> None:
    print(f"\n== {title}: exit code {code}\n{out}{err}")
    print(f"{'folder':<8}{'results':<9}{'W&B id':<10}{'group':<21}{'job type':<16}exit code")
    for job in sorted(path for path in folder.iterdir() if path.is_dir()):
        done = "yes" if RunFolder(job).done else "no"
        for one in sent(job):
            named = f"{one.run.run_id:<10}{one.run.run_group:<21}{one.run.job_type:<16}"
            print(f"{job.name:<8}{done:<9}{named}{one.exit_code}")
