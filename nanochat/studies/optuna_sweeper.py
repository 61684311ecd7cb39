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
from decimal import Decimal
from pathlib import Path
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
from nanochat.reports.live import name_job
from nanochat.run_folder import read_summary
from nanochat.search import Pruning, import_optuna, open_study

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)


class Search(Sweeper):
    """Asks Optuna (TPE) for values, trains with them, and tells it the val/bpb.

    Args:
        n_trials: of the whole search, those of earlier starts among them.
        seed: of the search.
        batch: trials that are asked for at once; more than 1 only with a launcher that runs jobs side by side.
        pruner, prune_after_trials, prune_after_validations: when a trial is given up, see `Pruning`.
    """

    def __init__(
        self,
        n_trials: int = 20,
        seed: int = 0,
        batch: int = 1,
        pruner: str | None = None,
        prune_after_trials: int = 4,
        prune_after_validations: int = 1,
    ) -> None:
        self.n_trials, self.seed, self.batch = n_trials, seed, batch
        self.pruning = (pruner, prune_after_trials, prune_after_validations)

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
        pruning = Pruning(*self.pruning)
        fixed, space = search_space(arguments)
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        with run_lock.hold(folder):
            study = open_study(folder, self.seed, pruning)
            OmegaConf.save(self.config, folder / "multirun.yaml")
            for trial in study.trials:
                name_job(trial.number, " ".join(overrides(trial, trial.params)))
            for trials in iter(lambda: self._next(study, space), []):
                jobs = [[*fixed, *overrides(trial, space)] for trial in trials]
                for trial in trials:
                    words = " ".join(overrides(trial, space))
                    name_job(trial.number, words)
                    log.info("Job %d: %s", trial.number, words)
                with _without_lists_of_jobs(self.launcher):
                    returned = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
                for trial, job in zip(trials, returned, strict=True):
                    _tell(study, trial.number, job)
            _conclude(study)

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


def _conclude(study: Study) -> None:
    """Say which trial is the best: of those that came to their end, as the others were not trained as long."""
    from optuna.trial import TrialState

    finished = study.get_trials(states=[TrialState.COMPLETE])
    pruned = len(study.get_trials(states=[TrialState.PRUNED]))
    if finished:
        best = study.best_trial
        words = " ".join(overrides(best, best.params))
        given_up = f" ({pruned} more were pruned)" if pruned else ""
        log.info("The best of %d trials%s is job %d: %s", len(finished), given_up, best.number, words)


def overrides(trial: FrozenTrial, keys: Iterable[str]) -> list[str]:
    """A trial's values as overrides."""
    return [f"{key}={_text(trial.params[key], trial.distributions[key])}" for key in keys]


def _text(value: Any, distribution: BaseDistribution) -> str:
    """A value as it is written; one of a range is 0.3, not 0.30000000000000004."""
    step, low = getattr(distribution, "step", None), getattr(distribution, "low", None)
    if not isinstance(value, float) or step is None or low is None:
        return str(value)
    return str(_decimal(low) + round((value - low) / step) * _decimal(step))


def _decimal(number: float) -> Decimal:
    return Decimal(repr(number))


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
    distributions = import_optuna().distributions
    value: Any = override.value()
    logarithmic = "log" in (getattr(value, "tags", None) or ())
    try:
        if isinstance(value, ChoiceSweep):
            return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
        if isinstance(value, RangeSweep):
            return _range(value, logarithmic)
        if isinstance(value, IntervalSweep):
            low, high = value.start, value.end
            if isinstance(low, int) and isinstance(high, int):
                return distributions.IntDistribution(low, high, log=logarithmic)
            return distributions.FloatDistribution(float(low or 0.0), float(high or 0.0), log=logarithmic)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {error}") from error
    raise UserError(f"{override.input_line}: give a choice (a,b), a range(...) or an interval(...).")


def _range(value: RangeSweep, logarithmic: bool) -> BaseDistribution:
    """The numbers of a range in their order; as in Python its end is not one of them."""
    distributions = import_optuna().distributions
    start, stop, step = (_decimal(part) for part in (value.start or 0, value.stop or 0, value.step))
    count = math.ceil((stop - start) / step) if step else 0
    if count < 1:
        raise ValueError("there is no number in this range")
    low, high = sorted((start, start + (count - 1) * step))
    step = abs(step)
    if all(isinstance(part, int) for part in (value.start or 0, value.stop or 0, value.step)):
        return distributions.IntDistribution(int(low), int(high), step=int(step), log=logarithmic)
    if logarithmic:
        raise ValueError("a logarithmic range has whole numbers; give an interval(...)")
    return distributions.FloatDistribution(float(low), float(high), step=float(step))


def _tell(study: Study, number: int, job: JobReturn) -> None:
    """Note how a trial ended; a user's mistake ends a search in which nothing has worked yet."""
    from optuna.trial import TrialState

    if study.get_trials()[number].state is not TrialState.RUNNING:
        return  # ended by someone else meanwhile
    failed = job.status is JobStatus.FAILED
    value = None if failed else job.return_value
    if not failed and job.hydra_cfg is not None:
        folder = Path(job.hydra_cfg.hydra.runtime.output_dir)
        if read_summary(folder).get("status") == "pruned":
            study.tell(number, state=TrialState.PRUNED)  # its last validation stays known
            return
    if value is not None and math.isfinite(value):
        study.tell(number, float(value))
        return
    study.tell(number, state=TrialState.FAIL)
    if failed and isinstance(error := job_error(job), UserError) and not study.get_trials(states=[TrialState.COMPLETE]):
        raise error
