"""Ctrl-C and SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer

from nanochat.files import shown
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.checkpoint import Checkpoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals(StepCallback):
    """Ends a run on SIGTERM (exit code 143) or SIGINT (130) after its optimizer step is finished and saved.

    A second signal ends the process at once. Lightning's own handlers save nothing and stop between micro-batches, so
    ours stand in their place while the run trains or validates. Place it after everything else that works at the end
    of a step.

    Raises:
        SystemExit: 143 or 130, once the run is saved.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._leave(trainer)  # at a boundary: the step before is saved

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _install(self) -> None:
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        # a handler may interrupt a log call, so the message goes straight to stderr
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step; once more to leave at once.\n".encode())

    def _leave(self, trainer: Trainer) -> None:
        if self.received is None:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint) and trainer.state.fn == "fit":
                callback.save(trainer)
                callback.wait()
        log.warning(
            "Stopped by %s after step %d; resume with: nanochat train --resume %s",
            signal.Signals(self.received).name,
            trainer.global_step,
            shown(Path(trainer.default_root_dir)),
        )
        raise SystemExit(128 + self.received)
