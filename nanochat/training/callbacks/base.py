"""What the callbacks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from nanochat.errors import UserError


class StepCallback(Callback):
    """A callback that works once per optimizer step, however many micro-batches make one.

    Subclasses override `on_step_end`; `step` counts the optimizer steps done.
    """

    _seen: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            self.on_step_end(trainer, pl_module, trainer.global_step)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """After optimizer step number `step`; `pl_module.step_metrics` holds its numbers."""


def validation_due(trainer: Trainer) -> bool:
    """Whether a validation belongs after the optimizer step that was just done."""
    interval = trainer.val_check_batch  # micro-batches
    if not trainer.enable_validation or not isinstance(interval, int) or not trainer.global_step:
        return False
    return trainer.global_step * trainer.accumulate_grad_batches % interval == 0


def validations_done(trainer: Trainer) -> int:
    """How many validations belong to the steps done so far, however often the run was resumed."""
    interval = trainer.val_check_batch
    return trainer.global_step * trainer.accumulate_grad_batches // interval if isinstance(interval, int) else 0


def unwritable(path: Path, error: OSError) -> UserError:
    """What to tell the user of a file of the run that cannot be written."""
    return UserError(f"{path} cannot be written: {error.strerror or error}; free some space or make it writable.")
