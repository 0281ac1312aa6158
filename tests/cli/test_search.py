"""Optuna chooses the jobs of a sweep: the largest metric is the best, and stops and failures change nothing."""

import fcntl
import inspect
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection, load_study
from optuna.trial import TrialState
from support.jobs import Answer, began, only
from support.tiny import composed

from icl_msr.cli.search import OptunaSweeper, values
from icl_msr.core.config import check, config_dir
from icl_msr.core.errors import UserError

Command = Callable[..., Answer]
WORDS = ("method=simclr", "hydra/launcher=process", "hydra/sweeper=optuna", "hydra.sweep.dir=here")
SEEDS = "seed=range(1,50)"
RANDOM = "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler"


def study(folder: Path = Path("here")) -> Any:
    return load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))))


def seeds(folder: Path = Path("here")) -> list[int]:
    return [trial.params["seed"] for trial in study(folder).trials]


@pytest.fixture
def drawn(command: Command, tmp_path: Path) -> list[int]:
    """The seeds of eight trials that nothing has stopped."""
    answer = command(*WORDS[:-1], f"hydra.sweep.dir={tmp_path}/whole", SEEDS, RANDOM, "hydra.sweeper.n_trials=8")
    assert (answer.code, answer.err) == (0, [])
    return seeds(tmp_path / "whole")


def test_the_largest_metric_is_the_best(command: Command) -> None:
    answer = command(*WORDS, SEEDS, "hydra.sweeper.n_trials=3")
    assert (answer.code, answer.err) == (0, [])
    assert study().directions == [StudyDirection.MAXIMIZE]
    best = max(seeds())
    folder = f"here/{seeds().index(best)}"
    assert answer.out[-2:] == [
        f"Best of 3 trials: metric {best / 10:.4f} in {folder} with seed={best}",
        "Jobs done: 3 of 3. Compare them: python -m icl_msr.report here",
    ]
    assert [line for line in answer.out if line == f"[3/3] seed={seeds()[2]}: here/2"]
    written = yaml.safe_load(Path("here/optimization_results.yaml").read_text())
    solution = {"folder": folder, "params": {"seed": best}, "values": {"metric": best / 10}}
    assert written == {"name": "optuna", "failed": 0, "solutions": [solution]}


def test_failed_and_refused_trials_do_not_end_the_search(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job fails, others are refused because a seed is not negative; the search succeeds."""
    words = (*WORDS, "seed=range(-20,50)", RANDOM, "hydra.sweeper.n_trials=8", "hydra.sweeper.seed=3")
    monkeypatch.setenv("JOB17", "sys.exit('the disk is on fire')")
    answer = command(*words)
    drawn, refused = seeds(), [seed for seed in seeds() if seed < 0]
    assert refused
    assert 17 in drawn
    states = [TrialState.FAIL if seed in (17, *refused) else TrialState.COMPLETE for seed in drawn]
    assert [trial.state for trial in study().trials] == states
    assert answer.code == 0
    assert sorted(answer.err) == sorted(
        ["the disk is on fire", *(f"seed={seed} is not allowed; it should be at least 0." for seed in refused)]
    )
    assert answer.out[-2].startswith(f"Best of 8 trials: metric {max(drawn) / 10:.4f} in here/")
    done, begun = states.count(TrialState.COMPLETE), len(drawn) - len(refused)
    assert answer.out[-1] == f"Jobs done: {done} of {begun}. Compare them: python -m icl_msr.report here"
    assert yaml.safe_load(Path("here/optimization_results.yaml").read_text())["failed"] == 8 - done

    # The search is over: the same command begins another one only where it chooses the folder.
    assert command(*words).out[-2:] == answer.out[-2:]
    assert max(began(Path("here", str(number))) for number in range(8)) == 1


def test_a_search_that_is_stopped_is_continued_by_the_same_command(
    command: Command, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a signal in its fourth trial, which goes on; the search is the one that nothing has stopped."""
    words = (*WORDS[:-1], SEEDS, RANDOM, "hydra.sweeper.n_trials=8")
    monkeypatch.setenv(f"JOB{drawn[3]}", "os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)")
    answer = command(*words)
    assert (answer.code, answer.err) == (75, ["The sweep was stopped; the same command continues it."])
    monkeypatch.delenv(f"JOB{drawn[3]}")
    (folder,) = Path("runs/sweeps").iterdir()
    assert seeds(folder) == drawn[:4]
    assert study(folder).trials[3].state == TrialState.RUNNING
    answer = command(*words)
    assert (answer.code, answer.err) == (0, [])
    assert answer.out[0] == f"Continuing {folder}; jobs done so far: 3."
    assert seeds(folder) == drawn
    assert [began(folder / str(number)) for number in range(8)] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert answer.out[-2].startswith(f"Best of 8 trials: metric {max(drawn) / 10:.4f} in {folder}/")
    assert command(*words, "hydra.sweeper.n_trials=1").code == 0  # another search, in a folder of its own
    assert len(list(Path("runs/sweeps").iterdir())) == 2


def test_trials_side_by_side(command: Command, drawn: list[int]) -> None:
    """As many are chosen together as the launcher runs, and all failed ones are no result."""
    answer = command(*WORDS, SEEDS, RANDOM, "hydra.sweeper.n_trials=5", "hydra.launcher.jobs=2")
    assert answer.code == 0
    assert seeds() == drawn[:5]
    assert sorted(path.parent.name for path in Path("here").glob("*/job.log")) == list("01234")


def test_all_trials_may_fail(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        monkeypatch.setenv(f"JOB{seed}", "sys.exit(3)")
    answer = command(*WORDS, "seed=1,2", "hydra.sweeper.n_trials=2")
    assert answer.code == 3
    assert answer.err == ["All 2 trials have failed; change the command, or remove here to try again."]
    assert not Path("here/optimization_results.yaml").exists()


def test_several_objectives(command: Command) -> None:
    """The largest metric takes the least time here, and with two of one kind all trials are best."""
    words = (*WORDS, SEEDS, "hydra.sweeper.n_trials=4")
    answer = command(*words, "hydra.sweeper.objectives=[metric,-wall_time_s]")
    assert (answer.code, answer.err) == (0, [])
    assert study().directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    best = max(seeds())
    assert f"metric {best / 10:.4f}, wall_time_s {10 - best:.4f} in here/" in answer.out[-2]
    assert "Best of 4" not in answer.out[-3]
    answer = command(*words[:3], *words[4:], "hydra.sweep.dir=there", "hydra.sweeper.objectives=[metric,wall_time_s]")
    assert [line[:16] for line in answer.out[-5:-1]] == ["Best of 4 trials"] * 4


def test_an_objective_has_the_name_that_results_have(command: Command) -> None:
    objectives = "hydra.sweeper.objectives=[metric,'-knn a - b']"
    answer = command(*WORDS, SEEDS, "hydra.sweeper.n_trials=2", objectives)
    assert (answer.code, answer.err) == (0, [])
    for seed in seeds():
        assert any(f"metric {seed / 10:.4f}, knn a - b {seed}.0000 in here/" in line for line in answer.out[-3:-1])


def test_the_first_trial_finds_a_wrong_objective(command: Command) -> None:
    answer = command(*WORDS, SEEDS, "hydra.sweeper.objectives=[metrik]")
    assert answer.code == 2
    assert answer.err == ["hydra.sweeper.objectives: here/0 has no metrik; did you mean metric?"]


MISTAKES = [
    ([], "nothing to choose"),
    (["method.temperature=0.1"], "nothing to choose"),
    ([SEEDS, "method.temprature=0.1"], "method.temperature"),
    ([SEEDS, "method.temperature=-1"], "greater than 0"),
    (["method.temperature=interval(1,0)"], "method.temperature=interval(1,0)"),
    ([SEEDS, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0"),
    ([SEEDS, "hydra.sweeper.objectives=[]"], "hydra.sweeper.objectives=[]"),
    ([SEEDS, "hydra.sweeper.sampler._target_=optuna.samplers.TPSampler"], "hydra.sweeper.sampler"),
    ([SEEDS, "hydra.sweeper.sampler._target_=torch.nn.ReLU"], "BaseSampler"),
    ([SEEDS, "+hydra.sweeper.sampler.seed=1"], "hydra.sweeper.seed"),
    ([SEEDS, "hydra/launcher=slurm", "hydra.launcher.follow=false"], "hydra.launcher.follow=false"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes(words: list[str], said: str, command: Command) -> None:
    answer = command("method=simclr", "hydra/sweeper=optuna", "hydra.sweep.dir=here", *words)
    assert (answer.code, answer.out, len(answer.err)) == (2, [], 1), answer
    assert said in answer.err[0]
    assert not Path("here").exists()


def test_another_search_in_the_folder_is_refused(command: Command) -> None:
    assert command(*WORDS, "seed=1,2", "hydra.sweeper.n_trials=1").code == 0
    answer = command(*WORDS, "seed=1,2,3", "hydra.sweeper.n_trials=2")
    assert (answer.code, answer.err) == (2, ["here/study.log holds another search; choose another hydra.sweep.dir."])
    assert command(*WORDS, "seed=1,2", "hydra.sweeper.n_trials=2").code == 0
    assert len(study().trials) == 2


VALUES = [
    ("a=1,2", CategoricalDistribution(["1", "2"])),
    ("a=[0.1,1],[2,3]", CategoricalDistribution(["[0.1,1]", "[2,3]"])),
    ("a=range(10,1,-3)", IntDistribution(4, 10, step=3)),
    ("a=range(0.1,1.0,0.1)", FloatDistribution(0.1, 0.9, step=0.1)),
    ("a=interval(0,1.5)", FloatDistribution(0, 1.5)),
    ("a=int(interval(1,5))", IntDistribution(1, 5)),
    ("a=tag(log,interval(1e-4,1))", FloatDistribution(1e-4, 1, log=True)),
]


@pytest.mark.parametrize(("word", "expected"), VALUES, ids=[word for word, _ in VALUES])
def test_values(word: str, expected: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([word])
    assert values(override) == expected


@pytest.mark.parametrize("word", ["a=range(3,3)", "a=interval(2,1)", "a=tag(log,interval(0,1))"])
def test_no_values(word: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([word])
    with pytest.raises(UserError, match=r"gives nothing to choose from \(.+\); correct it\.$"):
        values(override)


def test_the_yaml_file_fits_the_sweeper(command: Command) -> None:
    node = yaml.safe_load((config_dir() / "hydra" / "sweeper" / "optuna.yaml").read_text())
    assert issubclass(resolve_name(node.pop("_target_")), Sweeper)
    parameters = inspect.signature(OptunaSweeper).parameters
    assert node.keys() - {"_recursive_"} == parameters.keys()
    assert all(parameter.default is parameter.empty for parameter in parameters.values())


SPACES = sorted(file.stem for file in (config_dir() / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("space", SPACES)
def test_every_space_holds_values_that_a_run_takes(space: str) -> None:
    """Its ends, and every choice."""
    params = yaml.safe_load((config_dir() / "sweep" / f"{space}.yaml").read_text())
    words = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    ends = {str(word.key_or_group): both(values(word)) for word in words}
    for column in itertools.zip_longest(*ends.values()):
        check(composed(*(f"{key}={choice or ends[key][0]}" for key, choice in zip(ends, column, strict=True))))


def both(distribution: Any) -> Sequence[str]:
    """All choices, or the ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return str(distribution.low), str(distribution.high)


def test_a_space_of_the_group_is_searched(command: Command) -> None:
    answer = command(*WORDS, "seed=1", "sweep=temperature", "hydra.sweeper.n_trials=2", "method.temperature=0.3,0.4")
    assert (answer.code, answer.err) == (0, [])
    assert {trial.params["method.temperature"] for trial in study().trials} <= {"0.3", "0.4"}  # typed words go first
    answer = command(*WORDS[:2], "seed=1", "sweep=temperature", "hydra.sweep.dir=there")
    assert answer.code == 2
    assert answer.err == [
        "interval(...) is a range, and this sweep tries values; write them out, or add hydra/sweeper=optuna."
    ]


def test_one_process_leads_a_search(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the unfinished search, whoever leads it, and begins no second one."""
    words = ("method=simclr", "hydra/launcher=process", "hydra/sweeper=optuna", "seed=5,6", "hydra.sweeper.n_trials=2")
    for seed in (5, 6):
        monkeypatch.setenv(f"JOB{seed}", "sys.exit(75)")
    assert command(*words).code == 75
    folder = only(tmp_path)
    leader = os.open(folder, os.O_RDONLY)
    fcntl.flock(leader, fcntl.LOCK_EX)
    answer = command(*words)
    os.close(leader)
    spread = "one process leads a search, and hydra/launcher=slurm or process spreads its jobs"
    where = folder.relative_to(tmp_path)
    said = f"{where} is another process's sweep; {spread}; wait for its end, or choose another hydra.sweep.dir."
    assert (answer.code, answer.err) == (2, [said])
    assert only(tmp_path) == folder
