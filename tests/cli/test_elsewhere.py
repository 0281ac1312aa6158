"""Launchers of Hydra's plug-ins: whichever takes a job to a process, the job is the same command in its own folder."""

import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict
from support.jobs import Answer, began
from support.programs import Programs, steps, until
from support.tiny import DATA, MODEL

from icl_msr.cli.stopping import PAUSE, Stop
from icl_msr.core.folder import RunFolder

Command = Callable[..., Answer]


class Courier(Launcher):
    """Takes pickled tasks out of their wrapping where it is."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config, self.parcel = hydra_context, config, pickle.dumps(task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return [self.run(number, list(words)) for number, words in enumerate(job_overrides, initial_job_idx)]

    def run(self, number: int, words: list[str]) -> JobReturn:
        config = self.context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self.context,
            task_function=pickle.loads(self.parcel),
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


class Broken(Courier):
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise TypeError("run_job() misses an argument\nof this year")


class Stopped(Courier):
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        Path("here/stop").write_text("2")
        raise RuntimeError("a worker is gone")


@pytest.fixture
def couriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers by the names `courier`, `broken` and `stopped`."""
    kinds, theirs = {"courier": Courier, "broken": Broken, "stopped": Stopped}, Plugins._instantiate

    def ours(self: Any, config: DictConfig) -> Any:
        return kinds[config._target_]() if config._target_ in kinds else theirs(self, config)

    monkeypatch.setattr(Courier, "__module__", "hydra_plugins.test")
    monkeypatch.setattr(Plugins, "_instantiate", ours)
    for kind in kinds.values():
        monkeypatch.setitem(kind.launch.__globals__, "__name__", "hydra_plugins.hydra_old_launcher")


COURIER = ("hydra/launcher=basic", "hydra.launcher._target_=courier", "hydra.sweep.dir=here")


def test_a_job_is_the_same_command_in_its_own_folder(command: Command, couriers: None, tmp_path: Path) -> None:
    answer = command("seed=1,2", "method=simclr", *COURIER, "trust=mine")
    assert (answer.code, answer.err) == (0, [])
    lines = [line for line in answer.out if "HYDRA" not in line]
    assert lines == [
        "seed=1: metric 0.1000",
        "seed=2: metric 0.2000",
        "Jobs done: 2 of 2. Compare them: python -m icl_msr.report here",
    ]
    for number in "01":
        told: Any = json.loads((tmp_path / "here" / number / "environment").read_text())
        assert (told["WANDB_RUN_GROUP"], told["WANDB_JOB_TYPE"]) == ("here", "method=simclr")
        assert told["WORDS"] == [f"seed={int(number) + 1}", "method=simclr", "trust=[mine]"]
        assert (tmp_path / "here" / number / "job.log").read_text() == f"job {int(number) + 1} at work\n"


def test_a_job_that_fails_gives_the_command_its_exit_code(
    command: Command, couriers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB1", "sys.exit('the disk is on fire')")
    words = ("seed=1,2", "method=simclr", *COURIER)
    answer = command(*words)
    assert answer.code == 1
    assert "seed=1: exit code 1, see" in "\n".join(answer.out)
    assert Path("here/0/job.log").read_text().endswith("the disk is on fire\n")
    assert answer.out[-1].startswith("Jobs done: 1 of 2; the same command finishes the others.")
    monkeypatch.delenv("JOB1")
    assert command(*words).code == 0
    assert began(Path("here/0")) == 2


def test_the_metric_reaches_a_sweeper(command: Command, couriers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB1", "sys.exit(1)")
    answer = command("seed=1,2", *COURIER, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "method=simclr")
    assert answer.code == 0
    assert "Best of 6 trials: metric 0.2000 in here/" in answer.out[-2]


def test_a_launcher_that_fails_is_named(command: Command, couriers: None) -> None:
    answer = command("seed=1,2", "method=simclr", *COURIER, "hydra.launcher._target_=broken")
    assert (answer.code, answer.out) == (2, [])
    said = "hydra/launcher=basic has failed (TypeError: run_job() misses an argument)"
    assert answer.err == [f"{said}; type hydra/launcher=process instead."]
    assert not Path("here").exists()


STOPPED = "Path('here/stop').write_text('15'); time.sleep(60)"
"""A job in whose midst somebody stops the command. The signal reaches it in less time."""


def test_a_command_that_is_stopped_stops_its_jobs(
    command: Command, couriers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("seed=1,2,3", "method=simclr", *COURIER)
    monkeypatch.setenv("JOB2", STOPPED)
    answer = command(*words)
    assert (answer.code, answer.err) == (75, ["The sweep was stopped; the same command continues it."])
    assert [began(Path("here", number)) for number in "012"] == [1, 1, 0]
    assert not Path("here/stop").exists()
    monkeypatch.delenv("JOB2")
    assert command(*words).code == 0
    assert [began(Path("here", number)) for number in "12"] == [2, 1]


def test_a_search_that_is_stopped_loses_no_trial(
    command: Command, couriers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("seed=range(1,50)", "method=simclr", *COURIER, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3")
    whole = command(*words, "hydra.sweep.dir=whole")
    second = json.loads(Path("whole/1/environment").read_text())["WORDS"][0].removeprefix("seed=")
    monkeypatch.setenv(f"JOB{second}", STOPPED)
    answer = command(*words)
    assert (answer.code, answer.err) == (75, ["The sweep was stopped; the same command continues it."])
    monkeypatch.delenv(f"JOB{second}")
    again = command(*words)
    assert again.code == 0
    assert again.out[-2] == whole.out[-2].replace("whole/", "here/")


def test_a_launcher_may_dislike_that_its_jobs_have_ended(command: Command, couriers: None) -> None:
    words = ("seed=1,2", "method=simclr", *COURIER, "hydra.launcher._target_=stopped")
    answer = command(*words)
    assert (answer.code, answer.err) == (75, ["The sweep was stopped; the same command continues it."])


def test_a_signal_that_the_process_has_received_is_not_passed_on_twice(tmp_path: Path) -> None:
    sent: list[int] = []
    child: Any = SimpleNamespace(poll=lambda: None, send_signal=sent.append)
    for received, expected in (([2], []), ([], [15])):
        stop = Stop(tmp_path)
        stop.path.write_text("15")
        with stop.passed_on([child], received):
            time.sleep(3 * PAUSE)
        assert sent == expected


# ----------------------------------------------------------------------------------------------------- the real program

SHORT = [*DATA, *MODEL, "regularizer=none", "evaluation=none", "logger=csv", "~callbacks.online", "metric=loss"]
SHORT += ["method=simclr", "trainer.max_epochs=1", "trainer.log_every_n_steps=1", "hardware=cpu"]
PLUGINS = {"joblib": ["hydra.launcher.n_jobs=2"], "ray": ["+hydra.launcher.ray.init.num_cpus=2"], "submitit_local": []}


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    started = Programs(tmp_path)
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", PLUGINS)
def test_four_jobs_of_a_plugin(plugin: str, programs: Programs, tmp_path: Path) -> None:
    """One is refused, and the results of the others are those of any run."""
    package = plugin.partition("_")[0]
    if not find_spec(package) or not find_spec(f"hydra_plugins.hydra_{package}_launcher"):
        pytest.skip(f"hydra-{package}-launcher is not installed")
    words = ["-m", *SHORT, "loader.batch_size=8,16,1000000,32", f"hydra/launcher={plugin}", *PLUGINS[plugin]]
    program = programs(*words, f"hydra.sweep.dir={tmp_path}/sweep")
    assert program.wait() == 1, program.err
    folders = [RunFolder(tmp_path / "sweep" / number) for number in "0123"]
    assert [folder.done for folder in folders] == [True, True, False, True]
    assert all(folder.metric() > 0 for folder in folders if folder.done)
    refused = "loader.batch_size=1000000 is larger than the training split; set it to 64 or less.\n"
    assert (tmp_path / "sweep" / "2" / "job.log").read_text() == refused
    assert "Jobs done: 3 of 4; the same command finishes the others." in program.out
    programs.gone(30)


@pytest.mark.slow
def test_ctrl_c_saves_the_jobs_of_joblib(programs: Programs, tmp_path: Path) -> None:
    """A terminal sends it to all processes of the command at once."""
    long = [word for word in SHORT if not word.startswith("trainer.max_epochs")]
    words = ["-m", *long, "trainer.max_epochs=400", "loader.batch_size=8,16,32", "hydra/launcher=joblib"]
    program = programs.start(*words, "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}/sweep")
    jobs = [tmp_path / "sweep" / number for number in "01"]
    until(lambda: min(map(steps, jobs)) > 9 or program.process.poll() is not None)
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.wait() == 75
    assert program.err == "The sweep was stopped; the same command continues it.\n"
    for job in jobs:
        last = (job / "job.log").read_text().splitlines()[-1]
        assert last.startswith(f"Stopped by SIGINT after {steps(job)} steps; all is saved.")
    programs.gone(30)
