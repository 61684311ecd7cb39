"""metrics.csv: every number of every step, without an account."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.run_folder import read_metrics
from nanochat.training.callbacks.base import StepCallback

FIRST = ("step", "train/loss")
LAST = ("skipped_steps", "val/loss", "val/bpb")


class MetricsCSV(StepCallback):
    """Writes metrics.csv into the run's folder, one row per optimizer step, and passes it on to the loggers.

    Args:
        every_n_steps: steps between rows; a validation's step always has one.

    Columns: `step` (optimizer steps done), all of the module's `step_metrics`, `skipped_steps`, `val/loss`, `val/bpb`.
    Each row is on disk when its step ends. A resume drops the rows beyond its checkpoint and goes on below.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"callbacks.metrics.every_n_steps={every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self._row: dict[str, Any] = {}
        self._columns: list[str] = []
        self._row_at: int | None = None
        """where in the file the row of the present step begins, if it is there"""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        path = self._path(trainer)
        kept = [row for row in read_metrics(path) if int(row["step"]) < trainer.global_step]
        if trainer.global_step and self._row.get("step") == trainer.global_step:
            if trainer.global_step % self.every_n_steps == 0:
                kept.append({name: _text(value) for name, value in self._row.items()})
        else:
            self._row = {"step": trainer.global_step}
        self._columns = _order([*{name: None for row in kept for name in row}])
        self._row_at = None
        self._rewrite(path, kept)
        if kept and int(kept[-1]["step"]) == trainer.global_step:
            self._row_at = path.stat().st_size - len(_line(self._columns, kept[-1]))

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._row = {
            "step": step,
            **pl_module.step_metrics,  # type: ignore[dict-item]
            "skipped_steps": getattr(trainer.optimizers[0], "skipped_steps", 0),
        }
        self._row_at = None
        if step % self.every_n_steps == 0:
            self._write(trainer)
            self._forward(trainer, self._row)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if self._row.get("step") != trainer.global_step:  # a validation on its own, after a resume that was at its end
            self._adopt(trainer)
        self._row.update(found)
        self._write(trainer)
        self._forward(trainer, found)

    def state_dict(self) -> dict[str, Any]:
        return {"row": {k: v for k, v in self._row.items() if not k.startswith("val/")}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._row = dict(state_dict["row"])

    @staticmethod
    def _path(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "metrics.csv"

    def _adopt(self, trainer: Trainer) -> None:
        """Take the file as it is, with the row of the present step if that is its last."""
        rows = read_metrics(self._path(trainer))
        self._columns = list(rows[0]) if rows else []
        self._row, self._row_at = {"step": trainer.global_step}, None
        if rows and int(rows[-1]["step"]) == trainer.global_step:
            self._row = {k: v for k, v in rows[-1].items() if v != ""}
            self._row["step"] = trainer.global_step
            self._row_at = self._path(trainer).stat().st_size - len(_line(self._columns, rows[-1]))

    def _forward(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in metrics.items() if k != "step"}, step=trainer.global_step)

    def _write(self, trainer: Trainer) -> None:
        """Append the present row, or write it over itself, which only ever makes it longer."""
        path = self._path(trainer)
        new = [name for name in self._row if name not in self._columns]
        if new:
            rows = [row for row in read_metrics(path) if int(row["step"]) < self._row["step"]]
            self._columns = _order([*self._columns, *new])
            rows.append({name: _text(value) for name, value in self._row.items()})
            self._rewrite(path, rows)
            self._row_at = path.stat().st_size - len(_line(self._columns, rows[-1]))
            return
        line = _line(self._columns, self._row)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                if self._row_at is None:
                    self._row_at = os.fstat(file).st_size
                # one call: a kill comes before it or after it
                os.pwrite(file, line, self._row_at)
            finally:
                os.close(file)
        except OSError as error:
            raise _unwritable(path, error) from error

    def _rewrite(self, path: Path, rows: list[dict[str, str]]) -> None:
        try:
            with atomic_write(path) as file:
                if self._columns:
                    file.write(_line(self._columns, dict(zip(self._columns, self._columns, strict=True))))
                for row in rows:
                    file.write(_line(self._columns, row))
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error.strerror or error}; free some space or make it writable.")


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
