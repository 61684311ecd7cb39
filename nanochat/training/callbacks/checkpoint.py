"""Whole checkpoints, the newest few, and one that is always called last.ckpt."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from nanochat import ranks
from nanochat.console import disk_size
from nanochat.errors import UserError
from nanochat.files import replacing
from nanochat.run_folder import STEP_FILE, point_latest, step_checkpoints
from nanochat.training.callbacks.base import StepCallback, validation_due
from nanochat.training.callbacks.guard import NonFiniteGuard
from nanochat.training.checkpoint_io import Writer
from nanochat.training.failures import is_lost

log = logging.getLogger(__name__)


class Checkpoint(StepCallback):
    """Saves `checkpoints/step=N.ckpt`, and the newest once more as `last.ckpt`, at optimizer-step boundaries only.

    Args:
        every_n_train_steps: optimizer steps between two saves; saved too: before each validation, at the end, when a
            signal comes, and on an exception between two steps. While steps are being dropped the save waits for a good
            one.
        keep: how many `step=N.ckpt` stay; None keeps all.
        every_n_minutes: save also when so much time has passed since the last save, as `last.ckpt` alone, which the
            next save replaces; None: never.
        asynchronous: copy the state, and write it while training goes on. `auto`: on GPUs; on a CPU the writing would
            take the time, and the copy the memory, of training itself. Runs on several ranks write as they save.

    A file is written aside, synced and renamed: whatever kills the run, `last.ckpt` is whole. It is a hard link of the
    newest `step=N.ckpt`, which costs no space; with keep=1 it is a copy, so that damage to one file always leaves
    another. Weights that are not finite are never saved. Asynchronous saving changes none of this but the moment: the
    file is there a little later, and the end of the run waits for it, whichever end that is.

    A warning says so when the disk has too little space for the files to come.

    Raises:
        UserError: the folder cannot be written (full, read-only); the files that were there are untouched. Of an
            asynchronous save it is raised at the next step.
    """

    def __init__(
        self,
        every_n_train_steps: int = 500,
        keep: int | None = 3,
        every_n_minutes: float | None = None,
        asynchronous: bool | str = "auto",
    ) -> None:
        if every_n_train_steps < 1 or (keep is not None and keep < 1):
            raise UserError(
                f"callbacks.checkpoint.every_n_train_steps={every_n_train_steps} and callbacks.checkpoint.keep={keep} "
                "must be at least 1 (keep=null keeps all)."
            )
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise UserError(f"callbacks.checkpoint.every_n_minutes={every_n_minutes} must be above 0 (null: never).")
        if asynchronous not in (True, False, "auto"):
            raise UserError(f"callbacks.checkpoint.asynchronous={asynchronous} must be true, false or auto.")
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self.every_n_minutes, self.asynchronous = every_n_minutes, asynchronous
        self._saved = 0
        self._saved_at = 0.0
        self._linked = False
        self._boundary = True
        self._due = False
        self._space_checked = False
        self._writer: Writer | None = None
        self._root = Path()

    @property
    def write_seconds(self) -> float:
        """How long the last file was written after its save had returned."""
        return self._writer.seconds if self._writer is not None else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved, self._saved_at = trainer.global_step, time.monotonic()
        self._root = Path(trainer.default_root_dir)
        for stale in self._folder(trainer).glob(".*.tmp") if trainer.is_global_zero else ():
            stale.unlink(missing_ok=True)
        wanted = pl_module.device.type == "cuda" if self.asynchronous == "auto" else self.asynchronous
        self._writer = Writer(self._written) if wanted and trainer.world_size == 1 else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._boundary = False
        if self._writer is not None:
            with self._in_words(self._saved):
                self._writer.check()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._boundary = True
        if not self._space_checked:  # the optimizer's state is there now
            self._space_checked = True
            self._check_space(trainer, self._expected_files())
        self._due = self._due or step % self.every_n_train_steps == 0 or validation_due(trainer)
        # dropped steps may begin a divergence, and the checkpoint to return to should lie before it
        dropping = any(isinstance(c, NonFiniteGuard) and c.streak for c in trainer.callbacks)  # type: ignore[attr-defined]
        if step >= trainer.max_steps >= 0 or trainer.should_stop or (self._due and not dropping):
            self.save(trainer)
            self._due = False
        elif not dropping and self._minutes_are_over():
            self.save(trainer, "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self.wait()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            alone = trainer.world_size == 1  # all ranks save together, and an exception may be one rank's
            if alone and not isinstance(exception, UserError) and trainer.state.fn == "fit":
                self.save(trainer)
            self.wait()
        except UserError as error:  # the exception at hand is the one to report
            log.warning("The run could not be saved: %s", error)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def _minutes_are_over(self) -> bool:
        if self.every_n_minutes is None:
            return False
        # clocks differ, and ranks that save at different steps would wait for one another
        return bool(ranks.first(time.monotonic() - self._saved_at >= 60.0 * self.every_n_minutes))

    def save(self, trainer: Trainer, name: str | None = None) -> None:
        """Save now, unless this step is saved already or is not finished.

        Args:
            name: of the file, `step=N.ckpt` by default.
        """
        step = trainer.global_step
        if not self._boundary or step == self._saved:
            return
        finite = all(bool(torch.isfinite(ranks.own_part(p)).all()) for p in trainer.lightning_module.parameters())
        if ranks.agreed(not finite):
            log.warning("Step %d is not saved: its weights are not finite.", step)
            return
        path = self._folder(trainer) / (name or f"step={step}.ckpt")
        with self._in_words(step):
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._writer is not None:
                trainer.save_checkpoint(path, storage_options=self._writer)
            else:
                trainer.save_checkpoint(path)
                if trainer.is_global_zero:
                    self._written(path)
        self._saved, self._saved_at = step, time.monotonic()
        self._check_space(trainer, 1)

    def wait(self) -> None:
        """Return when everything that was saved is on disk; raises `UserError` when it cannot be."""
        if self._writer is not None:
            with self._in_words(self._saved):
                self._writer.wait()

    def _written(self, path: Path) -> None:
        """After a file is whole, in the thread that has written it."""
        match = STEP_FILE.fullmatch(path.name)
        if match is not None:
            _repeat(path, path.with_name("last.ckpt"), link=self.keep != 1)
            self._prune(path.parent, int(match[1]))
        if not self._linked:
            with contextlib.suppress(OSError):  # a convenience only
                point_latest(self._root)
            self._linked = True

    @contextlib.contextmanager
    def _in_words(self, step: int) -> Iterator[None]:
        """Failed writes as a `UserError`."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if is_lost(error):  # another rank, while its state was gathered
                raise
            # torch turns a failed write into a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).split("\n")[0]
            raise UserError(
                f"step {step} cannot be saved in {self._root / 'checkpoints'}: {reason}; free some space or make it "
                "writable, and resume from the checkpoint before with ckpt_path=auto."
            ) from error

    def _prune(self, folder: Path, step: int) -> None:
        """Remove all but the newest; later steps are of an attempt that was given up for an earlier checkpoint."""
        found = step_checkpoints(folder)
        kept = [number for number in found if number <= step][: self.keep]
        for number, path in found.items():
            if number not in kept:
                path.unlink(missing_ok=True)

    # ---- disk space ---------------------------------------------------------------------------------------------

    def _expected_files(self) -> int:
        """Files to come until there are as many as stay, and the one that is written aside meanwhile."""
        there = len(step_checkpoints(self._root / "checkpoints"))
        stay = max(1, (self.keep or 1) - there)
        return stay + 1 + (self.keep == 1 or self.every_n_minutes is not None)

    def _check_space(self, trainer: Trainer, files: int) -> None:
        if not trainer.is_global_zero:
            return
        size = checkpoint_bytes(trainer)
        try:
            free = shutil.disk_usage(self._root).free
        except OSError:
            return
        if free < files * size:
            log.warning(
                "%s has %s left on its disk, and the next checkpoints need %s (%d of %s): free some space, or lower "
                "callbacks.checkpoint.keep.",
                self._root, disk_size(free), disk_size(files * size), files, disk_size(size),
            )  # fmt: skip


def checkpoint_bytes(trainer: Trainer) -> int:
    """About the size of a checkpoint: weights, buffers and optimizer states."""
    module = trainer.lightning_module
    weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    return weights + sum(optimizer.state_bytes() for optimizer in trainer.optimizers)  # type: ignore[attr-defined]


def _repeat(source: Path, target: Path, link: bool) -> None:
    """Make target the same file as source, or a copy; a copy too where the file system has no hard links."""
    with replacing(target) as aside:
        if link:
            with contextlib.suppress(OSError):
                os.link(source, aside)
                return
        shutil.copyfile(source, aside)
