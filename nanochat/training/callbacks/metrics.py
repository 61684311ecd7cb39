"""metrics.csv: every number of every step, without an account."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.run_folder import read_metrics
from nanochat.training.callbacks.base import StepCallback, unwritable

FIRST = ("step", "train/loss")
LAST = ("skipped_steps", "val/loss", "val/bpb")


class MetricsCSV(StepCallback):
    """Writes metrics.csv into the run's folder, and passes each row on to the loggers.

    Args:
        every_n_steps: steps between rows of training; a validation always has a row.

    An optimizer step's row has `step` (optimizer steps done), all of the module's `step_metrics` and `skipped_steps`; a
    validation's has `step`, `val/loss` and `val/bpb`. A row is on disk when its step or validation ends. A resume drops
    the rows beyond its checkpoint and appends.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"callbacks.metrics.every_n_steps={every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self._columns: list[str] | None = None
        """those of the file, None before it is opened"""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._open(trainer)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self.every_n_steps == 0:
            skipped = getattr(trainer.optimizers[0], "skipped_steps", 0)
            self._write(trainer, {**pl_module.step_metrics, "skipped_steps": skipped})  # type: ignore[dict-item]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._columns is None:  # a finished run is only validated again
            self._open(trainer)
        self._write(trainer, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "metrics.csv"

    def _open(self, trainer: Trainer) -> None:
        """Keep what comes before the present step's validation, which is still to come."""
        kept = []
        for row in read_metrics(self._path(trainer)):
            if int(row["step"]) == trainer.global_step:
                row = {name: "" if name.startswith("val/") else value for name, value in row.items()}
            if int(row["step"]) <= trainer.global_step and any(row[name] for name in row if name != "step"):
                kept.append(row)
        self._rewrite(trainer, kept)

    def _write(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        path, row = self._path(trainer), {"step": trainer.global_step, **metrics}
        if self._columns is None or set(row) - set(self._columns):
            self._rewrite(trainer, [*read_metrics(path), {name: _text(value) for name, value in row.items()}])
        else:
            try:
                with path.open("ab", buffering=0) as file:
                    file.write(_line(self._columns, row))  # one call: a kill comes before it or after it
            except OSError as error:
                raise unwritable(path, error) from error
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _rewrite(self, trainer: Trainer, rows: list[dict[str, str]]) -> None:
        path, self._columns = self._path(trainer), _order([name for row in rows for name in row]) if rows else []
        try:
            with atomic_write(path) as file:
                for row in [{name: name for name in self._columns}, *rows] if rows else []:
                    file.write(_line(self._columns, row))
        except OSError as error:
            raise unwritable(path, error) from error


def _order(names: list[str]) -> list[str]:
    """Without repeats; the step first, the validation last."""
    rest = [name for name in dict.fromkeys(names) if name not in FIRST and name not in LAST]
    return [*FIRST, *rest, *LAST]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _line(columns: list[str], row: dict[str, Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_text(row[name]) if name in row else "" for name in columns])
    return text.getvalue().encode()
