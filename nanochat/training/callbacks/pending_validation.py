"""The validation that a run was stopped in, made up for when it is resumed."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from nanochat.compat import validate_during_fit
from nanochat.training.callbacks.base import validation_due


class PendingValidation(Callback):
    """Validates before the first step of a resumed run, where a validation belongs after the checkpoint's step.

    Checkpoints are saved before the validation of their step, so that a run which is stopped in it loses nothing but
    the validation; Lightning itself would resume with the next batch. Place it after what records validations.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if validation_due(trainer):
            validate_during_fit(trainer)
