"""Sweeps whose jobs Optuna chooses from the results of earlier ones. The same command continues the study."""

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import NonNegativeInt, PositiveInt
from yaml import YAMLError

from icl_msr.cli.stopping import leave_if_stopped
from icl_msr.cli.sweeps import Job, exit_codes, plan
from icl_msr.core.config import Node, build_as, check_node, suggestion
from icl_msr.core.errors import UserError, reason
from icl_msr.core.folder import SEARCHED
from icl_msr.core.records import Outcome
from icl_msr.core.storage import atomic_write, readable
from icl_msr.core.terminal import complain
from icl_msr.report.searches import Trial

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError:
    raise UserError(
        "hydra/sweeper=optuna needs Optuna, which is not installed; type: pip install 'icl-msr[optuna]'."
    ) from None


class OptunaSweeper:
    """Lets Optuna choose the jobs of a sweep. Job n is trial n of the study that `study.log` in its folder holds.

    A trial that fails or is refused is a failed trial, and the search goes on. When the command is stopped, the same
    command finishes the trials that had begun and asks for the next ones.

    Args:
        n_trials: trials of the whole study, failed ones included.
        n_jobs: trials that are chosen together, and that the launcher may run side by side.
        objectives: names of numbers of `results.json` to maximise, or to minimise with a minus before the name.
        seed: a trial is drawn from this seed and its number, so that stops change nothing; null draws anew every time.
        sampler: a sampler of Optuna; it gets the seed.
        params: values or ranges by key, as on the command line, where they may be overridden.
    """

    def __init__(
        self,
        *,
        n_trials: PositiveInt,
        n_jobs: PositiveInt,
        objectives: list[str],
        seed: NonNegativeInt | None,
        sampler: Node,
        params: dict[str, Any] | None,
    ):
        self.n_trials, self.n_jobs, self.objectives, self.seed = n_trials, n_jobs, objectives, seed
        self.sampler, self.params = sampler, params or {}
        self.names = [name.removeprefix("-") for name in objectives]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives a sweeper. `hydra_plugins` registers this class as one.

        Raises:
            UserError: a key is wrong, or the launcher does not wait for results.
        """
        keys = {name: value for name, value in vars(self).items() if name not in ("names", "params")}
        check_node("hydra.sweeper", {**keys, "params": self.params, "_target_": f"{__name__}.OptunaSweeper"})
        if not self.objectives:
            raise UserError(
                "hydra.sweeper.objectives=[] is not allowed; name a number of results.json, such as metric."
            )
        if "seed" in self.sampler:
            raise UserError("hydra.sweeper.sampler.seed is decided by the program; type hydra.sweeper.seed=<number>.")
        if config.hydra.launcher.get("follow") is False:
            raise UserError("hydra/sweeper=optuna needs the results of its jobs; drop hydra.launcher.follow=false.")
        self._sampler(0)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.context, self.config, self.folder = hydra_context, config, Path(str(config.hydra.sweep.dir))
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: Sequence[str]) -> list[float] | None:
        """Run trials until there are `n_trials`, and return the best values; None if all have failed."""
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        overrides = {override.get_key_element(): override for override in parser.parse_overrides(words)}
        self.space = {key: values(override) for key, override in overrides.items() if override.is_sweep_override()}
        self.fixed = {key: str(override.input_line) for key, override in overrides.items() if key not in self.space}
        self.order = list(overrides)
        if not self.space:
            raise UserError(
                "hydra/sweeper=optuna has nothing to choose; give a key several values or a range, such as "
                "'method.temperature=interval(0.05,1)', or type sweep=temperature."
            )
        self.study = self._opened()
        while trials := self._next():
            for jobs in in_a_row([job for trial in trials if (job := self._accepted(trial))]):
                answers = self.launcher.launch([job.overrides for job in jobs], jobs[0].number)
                leave_if_stopped()
                for job, answer in zip(jobs, answers, strict=True):
                    self._tell(job, answer)
        return self._conclude()

    def _opened(self) -> optuna.Study:
        """Return the study of this sweep, new or continued."""
        file = self.folder / "study.log"
        with readable(file, "remove it to begin a new search"):
            study = optuna.create_study(
                study_name="sweep",
                storage=JournalStorage(JournalFileBackend(str(file))),
                directions=["minimize" if name[0] == "-" else "maximize" for name in self.objectives],
                load_if_exists=True,
            )
        searched = {
            "space": {key: str(distribution) for key, distribution in self.space.items()},
            "fixed": list(self.fixed.values()),
            "objectives": self.objectives,
        }
        if study.user_attrs.setdefault("searched", searched) != searched:
            raise UserError(f"{file} holds another search; choose another hydra.sweep.dir.")
        study.set_user_attr("searched", searched)
        return study

    def _next(self) -> list[FrozenTrial]:
        """Return the trials to run: those of a command that was stopped, or else new ones; none at the end."""
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            if trial.params.keys() != self.space.keys():  # killed while it was chosen
                self.study.tell(trial.number, state=TrialState.FAIL)
        if not (trials := self.study.get_trials(states=[TrialState.RUNNING])):
            for number in range(len(self.study.trials), self.n_trials)[: self.n_jobs]:
                self.study.sampler = self._sampler(number)
                self.study.ask(self.space)
            trials = self.study.get_trials(states=[TrialState.RUNNING])
        return trials

    def _sampler(self, number: int) -> BaseSampler:
        """Return a sampler for one trial."""
        seed = None if self.seed is None else int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        sampler: BaseSampler = build_as(BaseSampler, self.sampler, seed=seed)  # type: ignore[type-abstract]
        return sampler

    def _accepted(self, trial: FrozenTrial) -> Job | None:
        """Return the job of a trial; None if its config is refused, which is a failed trial.

        Raises:
            UserError: the first trial is refused, so the command is wrong.
        """
        try:
            return self._job(trial)
        except (UserError, HydraException, OmegaConfBaseException, YAMLError) as mistake:
            from icl_msr.cli.command import sentence  # which imports this room's other modules

            said = str(mistake) if isinstance(mistake, UserError) else sentence(mistake, self._words(trial))
        if trial.number == 0:
            (self.folder / "study.log").unlink()
            raise UserError(said)
        complain(said)
        self.study.tell(trial.number, state=TrialState.FAIL)
        return None

    def _job(self, trial: FrozenTrial) -> Job:
        return plan(self.context, self.config, self._words(trial), trial.number, self.n_trials)

    def _words(self, trial: FrozenTrial) -> list[str]:
        return [self.fixed.get(key) or f"{key}={trial.params[key]}" for key in self.order]

    def _tell(self, job: Job, answer: JobReturn) -> None:
        """Tell Optuna how a job has ended.

        Raises:
            UserError: its results do not have an objective.
        """
        try:
            done = math.isfinite(answer.return_value)
        except Exception:  # what a job in this process has raised
            traceback.print_exc()
            done = False
        if not done:
            self.study.tell(job.number, state=TrialState.FAIL)
            return
        found = Outcome.load(job.folder.path).numbers()
        for name in self.names:
            if name not in found:
                raise UserError(f"hydra.sweeper.objectives: {job.folder} has no {name}; {suggestion(name, found)}")
        self.study.tell(job.number, [found[name] for name in self.names])

    def _conclude(self) -> list[float] | None:
        """Print and write the best trials, and return the values of the first."""
        trials, complete = self.study.trials, self.study.get_trials(states=[TrialState.COMPLETE])
        if not complete:
            complain(f"All {len(trials)} trials have failed; change the command, or remove {self.folder} to try again.")
            exit_codes.append(1)
            return None
        exit_codes[:] = [0]  # failed trials belong to a search
        best = self.study.best_trials if len(self.names) > 1 else [self.study.best_trial]
        solutions = []
        for trial in best:
            job = self._job(trial)
            numbers = dict(zip(self.names, trial.values, strict=True))
            solution = Trial(str(job.folder), trial.params, numbers)
            solutions.append(asdict(solution))
            print(f"Best of {len(trials)} trials: {solution}", flush=True)
        results = {"name": "optuna", "failed": len(trials) - len(complete), "solutions": solutions}
        atomic_write(self.folder / SEARCHED, OmegaConf.to_yaml(OmegaConf.create(results)))
        return list(best[0].values)


def values(override: Override) -> BaseDistribution:
    """Return the values of a word such as `key=a,b`, `key=range(1,9)` or `key=tag(log,interval(0.01,1))`.

    Values of a list stay as they are typed. A range or interval of whole numbers gives whole numbers.

    Raises:
        UserError: there are none, or they cannot be in this order or on this scale.
    """
    value = override.value()
    try:
        more: dict[str, Any]
        if isinstance(value, IntervalSweep):
            ends, more = (value.start, value.end), {"log": "log" in value.tags}
        elif isinstance(value, RangeSweep):
            numbers = sorted(value.range())
            if not numbers:
                raise ValueError("it is empty")
            ends, more = (numbers[0], numbers[-1]), {"step": abs(value.step)}
        else:
            return CategoricalDistribution(list(override.sweep_string_iterator()))
        whole = all(isinstance(end, int) for end in ends)
        kind: Callable[..., BaseDistribution] = IntDistribution if whole else FloatDistribution
        return kind(*ends, **more)
    except (ValueError, TypeError) as error:
        raise UserError(f"{override.input_line} gives nothing to choose from ({reason(error)}); correct it.") from None


def in_a_row(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Yield the jobs in lists of consecutive numbers, as launchers take them."""
    row: list[Job] = []
    for job in jobs:
        if row and job.number != row[-1].number + 1:
            yield row
            row = []
        row.append(job)
    if row:
        yield row
