"""An end for runs that learn nothing more."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from nanochat.errors import ConfigError

log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Ends a run whose validation gets no better; what it saves and reports is that of any run's end.

    Args:
        patience: validations in a row without a new best, after which training ends (one comes every
            `trainer.val_check_interval` steps).
        min_delta: a validation is better than the best so far when it is lower by more than this, in the unit of
            `monitor`.
        monitor: `val/bpb` (bits per byte) or `val/loss` (nats per token).

    A run that is resumed stops where one never killed would. One that had stopped stops again after the validation it
    resumes with, unless `patience` has been raised. (Lightning's own takes its patience out of the checkpoint, and
    counts a validation that a resume makes up for a second time.)

    Raises:
        ConfigError: arguments that cannot be used.
    """

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, monitor: Literal["val/bpb", "val/loss"] = "val/bpb"
    ) -> None:
        problems = []
        if patience < 1:
            problems.append(f"callbacks.early_stopping.patience={patience} must be at least 1.")
        if not 0 <= min_delta < math.inf:
            problems.append(f"callbacks.early_stopping.min_delta={min_delta} must be a number of at least 0.")
        if problems:
            raise ConfigError(problems)
        self.patience, self.min_delta, self.monitor = patience, float(min_delta), monitor
        self._best, self._best_step, self._waited = math.inf, 0, 0
        self._seen: int | None = None
        """the step of the last validation that was counted"""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        step = trainer.global_step
        if step != self._seen:  # else the run was saved after it, and makes up for it once more
            self._seen = step
            value = float(trainer.callback_metrics[self.monitor])
            if value < self._best - self.min_delta:
                self._best, self._best_step, self._waited = value, step, 0
            else:
                self._waited += 1
        if self._waited >= self.patience:
            trainer.should_stop = True
            log.info(
                "Stopping after step %d: %s has not been lower than the %.4f of step %d in %d validations "
                "(callbacks.early_stopping.patience).",
                step,
                self.monitor,
                self._best,
                self._best_step,
                self._waited,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._best_step = float(state_dict["best"]), int(state_dict["best_step"])
        self._waited, self._seen = int(state_dict["waited"]), state_dict["seen"]
