"""Whole checkpoints, the newest few, and one that is always called last.ckpt."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from nanochat.errors import UserError
from nanochat.files import replacing
from nanochat.run_folder import point_latest, step_checkpoints
from nanochat.training.callbacks.base import StepCallback, validation_due
from nanochat.training.callbacks.guard import NonFiniteGuard

log = logging.getLogger(__name__)


class Checkpoint(StepCallback):
    """Saves `checkpoints/step=N.ckpt`, and the newest once more as `last.ckpt`, at optimizer-step boundaries only.

    Args:
        every_n_train_steps: optimizer steps between two saves; saved too: before each validation, at the end, when a
            signal comes, and on an exception between two steps. While steps are being dropped the save waits for a good
            one.
        keep: how many `step=N.ckpt` stay; None keeps all.

    A file is written aside, synced and renamed: whatever kills the run, `last.ckpt` is whole. It is a hard link of the
    newest `step=N.ckpt`, which costs no space; with keep=1 it is a copy, so that damage to one file always leaves
    another. Weights that are not finite are never saved.

    Raises:
        UserError: the folder cannot be written (full, read-only); the files that were there are untouched.
    """

    def __init__(self, every_n_train_steps: int = 500, keep: int | None = 3) -> None:
        if every_n_train_steps < 1 or (keep is not None and keep < 1):
            raise UserError(
                f"callbacks.checkpoint.every_n_train_steps={every_n_train_steps} and callbacks.checkpoint.keep={keep} "
                "must be at least 1 (keep=null keeps all)."
            )
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self._saved = 0
        self._linked = False
        self._boundary = True
        self._due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved = trainer.global_step
        for stale in self._folder(trainer).glob(".*.tmp"):
            stale.unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._boundary = False

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._boundary = True
        self._due = self._due or step % self.every_n_train_steps == 0 or validation_due(trainer)
        # dropped steps may begin a divergence, and the checkpoint to return to should lie before it
        dropping = any(isinstance(c, NonFiniteGuard) and c.streak for c in trainer.callbacks)  # type: ignore[attr-defined]
        if step >= trainer.max_steps >= 0 or trainer.should_stop or (self._due and not dropping):
            self.save(trainer)
            self._due = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, UserError) or trainer.state.fn != "fit":
            return
        try:
            self.save(trainer)
        except UserError as error:  # the exception at hand is the one to report
            log.warning("The run could not be saved: %s", error)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already or is not finished."""
        step = trainer.global_step
        if not self._boundary or step == self._saved:
            return
        if not all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters()):
            log.warning("Step %d is not saved: its weights are not finite.", step)
            return
        folder = self._folder(trainer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            newest = folder / f"step={step}.ckpt"
            trainer.save_checkpoint(newest)
            _repeat(newest, folder / "last.ckpt", link=self.keep != 1)
            self._prune(folder, step)
        except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).split("\n")[0]
            raise UserError(
                f"step {step} cannot be saved in {folder}: {reason}; free some space or make it writable, and resume "
                "from the checkpoint before with ckpt_path=auto."
            ) from error
        if not self._linked:
            with contextlib.suppress(OSError):  # a convenience only
                point_latest(Path(trainer.default_root_dir))
            self._linked = True
        self._saved = step

    def _prune(self, folder: Path, step: int) -> None:
        """Remove all but the newest; later steps are of an attempt that was given up for an earlier checkpoint."""
        found = step_checkpoints(folder)
        kept = [number for number in found if number <= step][: self.keep]
        for number, path in found.items():
            if number not in kept:
                path.unlink(missing_ok=True)


def _repeat(source: Path, target: Path, link: bool) -> None:
    """Make target the same file as source, or a copy; a copy too where the file system has no hard links."""
    with replacing(target) as aside:
        if link:
            with contextlib.suppress(OSError):
                os.link(source, aside)
                return
        shutil.copyfile(source, aside)
