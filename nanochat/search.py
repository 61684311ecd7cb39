"""The study of a search (`hydra/sweeper=optuna`): study.db in the sweep's folder, where a trial's number is its job's.

The sweeper asks it for values; the jobs, in whichever process they are, report their validations to it and ask whether
to go on. Importing this module imports neither Optuna nor torch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from nanochat.config.schema import sweep_folder, sweeper_minimises
from nanochat.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage

log = logging.getLogger(__name__)

STUDY = "nanochat"
PRUNERS = ("median", "hyperband")
PATIENCE = 60
"""seconds that a job waits while others write to study.db"""


@dataclass(frozen=True)
class Pruning:
    """When a trial is given up.

    Args:
        rule: `median`: its best validation so far is worse than the median of the other trials' at the same place;
            `hyperband`: it is not in the best third of those that came as far, at places that Hyperband chooses
            (Li et al., arXiv 1603.06560, in Optuna's asynchronous form). None: never.
        after_trials: that came to their end before `median` gives one up.
        after_validations: that every trial has at the least.

    Raises:
        UserError: values that cannot be used.
    """

    rule: str | None = None
    after_trials: int = 4
    after_validations: int = 1

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in PRUNERS:
            raise UserError(f"hydra.sweeper.pruner={self.rule} must be {', '.join(PRUNERS)} or null.")
        for name, least in (("after_trials", 0), ("after_validations", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"hydra.sweeper.prune_{name}={value} must be a whole number of at least {least}.")

    def pruner(self) -> BasePruner:
        """Optuna's; it counts validations, not optimizer steps."""
        pruners = import_optuna().pruners
        if self.rule == "median":
            return pruners.MedianPruner(n_startup_trials=self.after_trials, n_warmup_steps=self.after_validations)
        if self.rule == "hyperband":
            return pruners.HyperbandPruner(min_resource=self.after_validations)
        return pruners.NopPruner()


def import_optuna() -> ModuleType:
    """Optuna, without its remarks; raises `UserError` where it is missing."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'nanochat[optuna]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(folder: Path) -> RDBStorage:
    path = (folder / "study.db").absolute()
    storages = import_optuna().storages
    return storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": PATIENCE}})


def open_study(folder: Path, seed: int, pruning: Pruning | None = None) -> Study:
    """The study of a sweep's folder, which is made if it is missing.

    Raises:
        UserError: Optuna is missing, or the study's file is damaged or cannot be written.
    """
    optuna = import_optuna()
    with _in_words(folder):
        study = optuna.create_study(
            storage=_storage(folder), study_name=STUDY, load_if_exists=True, direction="minimize",
            pruner=(pruning or Pruning()).pruner(),
        )  # fmt: skip
        count = len(study.trials)
    # a search that goes on draws other numbers than at its start
    study.sampler = optuna.samplers.TPESampler(seed=seed + count)
    return study


@contextlib.contextmanager
def _in_words(folder: Path) -> Iterator[None]:
    """What goes wrong with a study as a `UserError`."""
    optuna = import_optuna()
    from sqlalchemy.exc import SQLAlchemyError  # a dependency of Optuna's

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError, KeyError) as error:
        # RuntimeError: another schema; KeyError: no such study or trial
        cause = error.__cause__ or error
        text = str(getattr(cause, "orig", cause)).partition("\n")[0].rstrip(".")
        path = (folder / "study.db").absolute()
        raise UserError(f"{path} cannot be used as a search's study: {text}.") from error


@dataclass(frozen=True)
class Trial:
    """A trial of a search whose trials may be given up, as its job sees it.

    Args:
        folder: of the sweep. number: of the trial, and of its job.
    """

    folder: Path
    number: int
    pruning: Pruning

    @classmethod
    def here(cls) -> Trial | None:
        """The trial that this process trains; None outside of a search, and where no trial is given up."""
        if not sweeper_minimises():
            return None
        hydra = HydraConfig.get()
        rule = hydra.sweeper.get("pruner")
        if rule is None:
            return None
        pruning = Pruning(rule, hydra.sweeper.prune_after_trials, hydra.sweeper.prune_after_validations)
        return cls(sweep_folder(hydra), int(hydra.job.num), pruning)

    def report(self, validation: int, value: float) -> bool:
        """Note a validation, and return whether to give the trial up.

        Args:
            validation: its number in the run, from 1. A run that was killed and resumed may report it once more.
            value: val/bpb.

        Raises:
            UserError: the study cannot be used, or the trial has been ended by someone else.
        """
        optuna = import_optuna()
        with _in_words(self.folder):
            storage = _storage(self.folder)
            try:
                study = optuna.load_study(study_name=STUDY, storage=storage, pruner=self.pruning.pruner())
                number = storage.get_trial_id_from_study_id_trial_number(
                    storage.get_study_id_from_name(STUDY), self.number
                )
                storage.set_trial_intermediate_value(number, validation, value)
                return bool(study.pruner.prune(study, storage.get_trial(number)))
            finally:
                storage.engine.dispose()
