"""heartbeat.json: that a run lives, and where it is."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from nanochat.errors import UserError
from nanochat.run_folder import HEARTBEAT
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.time_limit import find_limit, planned_steps


class Heartbeat(StepCallback):
    """Writes `step`, `max_steps` (estimated where the run ends with its time, null where unknown), `seconds_left`,
    `time` (Unix), `process` and `host` into the run's folder while it trains and validates.

    Args:
        every_n_seconds: at most so often; a step or a batch of validation that takes longer delays it.

    A file that cannot be written does not end the run: the checkpoints would tell.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        if not every_n_seconds >= 0:
            raise UserError(f"callbacks.heartbeat.every_n_seconds={every_n_seconds} must not be negative.")
        self.every_n_seconds = every_n_seconds
        self._beat = -math.inf
        self._start, self._first = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start, self._first = time.monotonic(), trainer.global_step
        self._write(trainer, pl_module, now=True)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._write(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, now=True)

    def _write(self, trainer: Trainer, module: LightningModule, now: bool = False) -> None:
        if not trainer.is_global_zero or (not now and time.monotonic() - self._beat < self.every_n_seconds):
            return
        self._beat = time.monotonic()
        content = {
            "step": trainer.global_step, **self._end(trainer, module),
            "time": time.time(), "process": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        path = Path(trainer.default_root_dir) / HEARTBEAT
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # not synced: after a power cut nothing of it matters
            aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(aside, path)

    def _end(self, trainer: Trainer, module: LightningModule) -> dict[str, float | int | None]:
        """The run's steps, and the seconds that are left."""
        done, limit = trainer.global_step, find_limit(trainer)
        steps = planned_steps(trainer, module)
        ends = [] if limit is None else [limit.left()]
        if steps is not None and done > self._first:
            ends.append((time.monotonic() - self._start) / (done - self._first) * max(0.0, steps - done))
        return {
            "max_steps": None if steps is None else round(steps),
            "seconds_left": round(min(ends), 1) if ends else None,
        }
