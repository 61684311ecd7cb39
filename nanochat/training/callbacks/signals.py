"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, leave; in a SLURM job, queue it again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer

from nanochat import ranks
from nanochat.files import shown
from nanochat.run_lock import TRY_LATER
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.checkpoint import Checkpoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
REQUEUED = {"SIGTERM", "SIGUSR1"}
"""what a scheduler sends before it takes the machine away"""


class Signals(StepCallback):
    """Ends a run on SIGTERM (exit code 143), SIGINT (130) or SIGUSR1 (75) after its optimizer step is finished and
    saved.

    Args:
        requeue: in a SLURM job, SIGTERM and SIGUSR1 put the job back into the queue (`scontrol requeue`), if its
            command resumes the run: with ckpt_path=auto or last, or --resume.

    A second signal ends the process at once. Lightning's own handlers save nothing and stop between micro-batches, so
    ours stand in their place while the run trains or validates. Place it after everything else that works at the end
    of a step.

    Raises:
        SystemExit: 143, 130 or 75, once the run is saved.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
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
        if ranks.rank() == 0:  # all ranks get it
            # a handler may interrupt a log call, so the message goes straight to stderr
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving after this step; once more to leave at once.\n".encode())

    def _leave(self, trainer: Trainer) -> None:
        received = int(ranks.agreed(self.received or 0))  # one rank's is every rank's
        if not received:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint) and trainer.state.fn == "fit":
                callback.save(trainer)
                callback.wait()
        log.warning(
            "Stopped by %s after step %d; resume with: nanochat train --resume %s",
            signal.Signals(received).name,
            trainer.global_step,
            shown(Path(trainer.default_root_dir)),
        )
        if self.requeue and signal.Signals(received).name in REQUEUED and trainer.is_global_zero:
            requeue(trainer.lightning_module.cfg.get("ckpt_path"))  # type: ignore[union-attr]
        raise SystemExit(exit_code(received))


def exit_code(number: int) -> int:
    """128 + the signal's number; 75 for SIGUSR1, by which a scheduler asks for the machine back: try again."""
    return TRY_LATER if signal.Signals(number).name == "SIGUSR1" else 128 + number


def requeue(ckpt_path: str | None) -> None:
    """Put this SLURM job back into the queue; outside of one nothing happens. What goes wrong is in the log."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if ckpt_path not in ("auto", "last"):
        log.warning(
            "Job %s is not queued again, since it would not resume: give hydra.run.dir and ckpt_path=auto.", job
        )
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip()
        log.warning("Job %s could not be queued again: %s", job, said)
    else:
        log.warning("Job %s is queued again.", job)
