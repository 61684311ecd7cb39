"""`hydra/sweeper=optuna`: a search for the settings with the lowest val/bpb.

Hydra's own plugin for Optuna requires a version before 3. The study lies in the sweep's folder (SQLite), and the number
of a trial is that of its job, so that a search that was killed goes on: finished trials count, and one that was
training is trained to its end in its folder.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from nanochat import run_lock
from nanochat.compat import job_error
from nanochat.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)

STUDY = "nanochat"


class Search(Sweeper):
    """Asks Optuna (TPE) for values, trains with them, and tells it the val/bpb.

    Args:
        n_trials: of the whole search, those of earlier starts among them.
        seed: of the search.
        batch: trials that are asked for at once; more than 1 only with a launcher that runs jobs side by side.
    """

    def __init__(self, n_trials: int = 20, seed: int = 0, batch: int = 1) -> None:
        self.n_trials, self.seed, self.batch = n_trials, seed, batch

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Train until there are `n_trials` trials.

        Raises:
            InUseError: another process searches in this folder.
            UserError: an option is wrong, Optuna is missing, nothing is left open, the folder or its study cannot be
                used, or the first trial cannot be run.
        """
        for name, value in (("n_trials", self.n_trials), ("batch", self.batch)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"hydra.sweeper.{name}={value} must be a whole number of at least 1.")
        fixed, space = search_space(arguments)
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        with run_lock.hold(folder):
            study = open_study(folder, self.seed)
            OmegaConf.save(self.config, folder / "multirun.yaml")
            for trials in iter(lambda: self._next(study, space), []):
                jobs = [[*fixed, *_overrides(trial, space)] for trial in trials]
                for trial in trials:
                    log.info("Job %d: %s", trial.number, " ".join(_overrides(trial, space)))
                with _without_lists_of_jobs(self.launcher):
                    returned = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
                for trial, job in zip(trials, returned, strict=True):
                    _tell(study, trial.number, job)
            finished = [trial for trial in study.trials if trial.value is not None]
            if finished:
                best = study.best_trial
                words = " ".join(_overrides(best, best.params))
                log.info("The best of %d trials is job %d: %s", len(finished), best.number, words)

    def _next(self, study: Study, space: dict[str, BaseDistribution]) -> list[FrozenTrial]:
        """Trials with numbers in a row: one that an earlier start left, or new ones."""
        from optuna.trial import TrialState

        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if set(trial.params) == set(space):
                return [trial]
            study.tell(trial.number, state=TrialState.FAIL)  # killed before it had its values
        count = min(self.batch, self.n_trials - len(study.trials))
        numbers = [study.ask(space).number for _ in range(count)]
        return [study.trials[number] for number in numbers]


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'nanochat[optuna]'.") from error
    return optuna


def open_study(folder: Path, seed: int) -> Study:
    """The study of a sweep's folder, which is made if it is missing.

    Raises:
        UserError: Optuna is missing, or the study's file is damaged or cannot be written.
    """
    optuna = _optuna()
    from sqlalchemy.exc import SQLAlchemyError  # a dependency of Optuna's

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (folder / "study.db").absolute()
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name=STUDY, load_if_exists=True, direction="minimize"
        )
        count = len(study.trials)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:  # the last: another schema
        cause = error.__cause__ or error
        text = str(getattr(cause, "orig", cause)).partition("\n")[0].rstrip(".")
        raise UserError(f"{path} cannot be used as a search's study: {text}.") from error
    # a search that goes on draws other numbers than at its start
    study.sampler = optuna.samplers.TPESampler(seed=seed + count)
    return study


@contextlib.contextmanager
def _without_lists_of_jobs(launcher: Launcher) -> Iterator[None]:
    """Keep a launcher from listing every override of its jobs, which it would do for each trial."""
    logger = logging.getLogger(type(launcher).__module__.rpartition(".")[0])  # its package
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _overrides(trial: FrozenTrial, keys: Iterable[str]) -> list[str]:
    """A trial's values as overrides."""
    return [f"{key}={trial.params[key]}" for key in keys]


def search_space(arguments: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """The overrides that are the same for all, and what is left open by key.

    Raises:
        UserError: Optuna is missing, nothing is left open, or in a way that Optuna does not know.
    """
    fixed, space = [], {}
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.is_sweep_override():
            space[override.get_key_element()] = _distribution(override)
        else:
            assert override.input_line is not None
            fixed.append(override.input_line)
    if not space:
        raise UserError(
            "hydra/sweeper=optuna searches over what is left open, such as optim=muon,adamw or "
            "'optim.lr=tag(log,interval(0.003,0.1))', and nothing is."
        )
    return fixed, space


def _distribution(override: Override) -> BaseDistribution:
    distributions = _optuna().distributions
    value: Any = override.value()
    logarithmic = "log" in (getattr(value, "tags", None) or ())
    try:
        if isinstance(value, ChoiceSweep | RangeSweep):
            return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
        if isinstance(value, IntervalSweep):
            low, high = value.start, value.end
            if isinstance(low, int) and isinstance(high, int):
                return distributions.IntDistribution(low, high, log=logarithmic)
            return distributions.FloatDistribution(float(low or 0.0), float(high or 0.0), log=logarithmic)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error
    raise UserError(f"{override.input_line}: give a choice (a,b), a range(...) or an interval(...).")


def _tell(study: Study, number: int, job: JobReturn) -> None:
    """Note how a trial ended; a user's mistake ends a search in which nothing has worked yet."""
    from optuna.trial import TrialState

    if study.get_trials()[number].state is not TrialState.RUNNING:
        return  # ended by someone else meanwhile
    failed = job.status is JobStatus.FAILED
    value = None if failed else job.return_value
    if value is not None and math.isfinite(value):
        study.tell(number, float(value))
        return
    study.tell(number, state=TrialState.FAIL)
    if failed and isinstance(error := job_error(job), UserError) and not study.get_trials(states=[TrialState.COMPLETE]):
        raise error
