"""`trainer.max_time`, at the boundary of a step."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from nanochat.training.callbacks.base import StepCallback


class TimeLimit(StepCallback):
    """Stops training after the first optimizer step that ends beyond the limit.

    Lightning's own timer stops between micro-batches, where the gradients of the unfinished step would be lost.

    Args:
        max_time: as of `Trainer(max_time=...)`: `DD:HH:MM:SS`, a timedelta, or its arguments. Validation counts,
            and so does the time before a resume.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int]) -> None:
        self.seconds = Timer(duration=max_time).time_remaining() or 0.0
        self._before = 0.0
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self._before + time.monotonic() - self._start

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self.elapsed() >= self.seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = float(state_dict["elapsed"])
