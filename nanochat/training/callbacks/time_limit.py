"""`trainer.max_time`: a run that ends when its time does, and with `schedule.horizon=time` its schedule too."""

from __future__ import annotations

import math
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from nanochat import ranks
from nanochat.console import duration
from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.training.callbacks.base import StepCallback, unwritable, validation_due
from nanochat.training.callbacks.checkpoint import Checkpoint

REMEMBERED = 8
"""recent steps, the slowest of which predicts the next one"""
VALIDATION_SHARE = 0.5
"""of a training micro-batch's time, what a batch of validation takes at most: it has no backward"""
FIRST_SECONDS, FIRST_SHARE = 2.0, 0.02
"""what a first validation takes besides (samples, the plot), and of the run's time at most"""


class TimeLimit(StepCallback):
    """Ends a run so that its last step, the validation after it and the last save fit into the time.

    Lightning's own timer stops between micro-batches, where the gradients of the unfinished step would be lost.

    Args:
        max_time: the run's time, see `duration`. Validations and saves count, and so does the time before a resume.
        horizon: with `time` the schedule ends with the time, too: before each step `max_steps` of the module becomes
            `step / progress`, where progress is the share of the training time that has passed at the step's start (or
            the share of `trainer.max_steps`, if that is set and larger). `train/progress` is in the metrics.

    The clock is monotonic, so that a wall clock that jumps does not matter. Before each step the time and the progress
    are written to clock.csv in the run's folder. Steps that a resumed run repeats take them from there: their rates,
    and so their losses, are the same, and the time of the lost attempt does not count twice.

    One object serves all attempts of a process: a return to an earlier checkpoint does not give the time back.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int], horizon: str = "steps") -> None:
        self.seconds = duration(max_time)
        self.horizon = horizon
        self.progress = 0.0
        """at the start of the present step, in [0, 1]"""
        self._before, self._start = 0.0, math.nan  # elapsed, and the clock, at one same moment
        self._step: int | None = None
        self._mark = 0.0  # when the present step, or the time between two, began
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._breaks: dict[str, deque[float]] = {kind: deque(maxlen=3) for kind in ("save", "validation")}
        self._break: str | None = None  # what the present time between two steps is for
        self._journal: Journal | None = None

    @property
    def begun(self) -> bool:
        """Whether this process has trained."""
        return not math.isnan(self._start)

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self._before + (time.monotonic() - self._start if self.begun else 0.0)

    def left(self) -> float:
        """Seconds until the time is up."""
        return max(0.0, self.seconds - self.elapsed())

    # ---- hooks --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        now = time.monotonic()
        if self.horizon == "time" and trainer.is_global_zero:
            self._journal = Journal(Path(trainer.default_root_dir), trainer.global_step, again=self.begun)
        if not self.begun:
            self._start = now
        self._mark, self._break, self._step = now, None, None
        if self._steps and not self._fits(trainer):  # a finished run that is resumed
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:  # a further micro-batch
            return
        now = time.monotonic()
        if self._break is not None:
            self._breaks[self._break].append(now - self._mark)
        self._step, self._mark, self._break = step, now, None
        if self.horizon != "time":
            return
        known = ranks.same(self._journal.recorded(step, self.seconds) if self._journal else None)
        if known is not None:
            self._before, self.progress = known
            self._start = now
        else:
            elapsed = self.elapsed()
            self.progress = ranks.first(self._progress(trainer, elapsed))
            if self._journal is not None:
                self._journal.write(step, elapsed, self.progress, self.seconds)
        pl_module.max_steps = self._estimated_steps(trainer)  # type: ignore[assignment]

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        now = time.monotonic()
        self._steps.append(now - self._mark)
        self._mark = now
        if self.horizon == "time":
            pl_module.step_metrics["train/progress"] = self.progress  # type: ignore[index, operator]
        trainer.should_stop = trainer.should_stop or not self._fits(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._break = "validation"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._steps:  # it may have taken longer than expected
            trainer.should_stop = trainer.should_stop or not self._fits(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._break = self._break or "save"

    def state_dict(self) -> dict[str, Any]:
        breaks = {kind: list(times) for kind, times in self._breaks.items()}
        return {"elapsed": self.elapsed(), "progress": self.progress, "steps": list(self._steps), "breaks": breaks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.begun:
            return
        self._before, self.progress = float(state_dict["elapsed"]), float(state_dict.get("progress", 0.0))
        self._steps.extend(state_dict.get("steps", ()))
        for kind, times in state_dict.get("breaks", {}).items():
            self._breaks[kind].extend(times)

    # ---- predictions --------------------------------------------------------------------------------------------

    def _fits(self, trainer: Trainer) -> bool:
        """Whether one more step, and what belongs after the last one, ends within the time."""
        present = self._validation_seconds(trainer) if validation_due(trainer) and self._break != "validation" else 0.0
        # clocks differ, and ranks that stop at different steps would wait for one another
        return bool(ranks.first(present + max(self._steps) + self._reserve(trainer) <= self.left()))

    def _reserve(self, trainer: Trainer) -> float:
        """Seconds that the last validation and save will take, as those before did."""
        writing = max((c.write_seconds for c in trainer.callbacks if isinstance(c, Checkpoint)), default=0.0)  # type: ignore[attr-defined]
        return max(self._validation_seconds(trainer), writing + max(self._breaks["save"], default=0.0))

    def _validation_seconds(self, trainer: Trainer) -> float:
        if not trainer.enable_validation:
            return 0.0
        if self._breaks["validation"]:  # with the save before it
            return max(self._breaks["validation"])
        batches = trainer.num_val_batches
        total = sum(batches) if isinstance(batches, list) else batches
        micro_batch = max(self._steps, default=0.0) / trainer.accumulate_grad_batches
        besides = min(FIRST_SECONDS, FIRST_SHARE * self.seconds)
        return besides + (VALIDATION_SHARE * micro_batch * total if math.isfinite(total) else 0.0)

    def _progress(self, trainer: Trainer, elapsed: float) -> float:
        """The share of the run that has passed; it never goes back."""
        room = self.seconds - self._reserve(trainer)
        found = elapsed / room if room > 0.0 else 1.0
        if trainer.max_steps > 0:
            found = max(found, trainer.global_step / trainer.max_steps)
        return min(1.0, max(self.progress, found))

    def _estimated_steps(self, trainer: Trainer) -> float:
        """The run's steps at its pace so far, of which the present one has the present progress."""
        if self.progress and trainer.global_step:
            return trainer.global_step / self.progress
        return trainer.max_steps if trainer.max_steps > 0 else math.inf


class Journal:
    """clock.csv: for each step begun, the training time and the progress at its start.

    Args:
        folder: the run's folder.
        step: optimizer steps done; rows before it stay.
        again: drop the rows from `step` on instead of repeating them.

    Raises:
        UserError: the file cannot be read or written.
    """

    HEAD = "step,elapsed,progress,max_time\n"

    def __init__(self, folder: Path, step: int, again: bool = False) -> None:
        self.path = folder / "clock.csv"
        rows = {row[0]: row for row in self._read()}
        self._rows = {} if again else {number: row for number, row in rows.items() if number >= step}
        kept = [rows[number] for number in sorted(rows) if number < step or not again]
        try:
            with atomic_write(self.path) as file:
                file.write("".join([self.HEAD, *map(self._line, kept)]).encode())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def recorded(self, step: int, seconds: float) -> tuple[float, float] | None:
        """Time and progress at the start of a step, None of one that was never begun or had another time limit."""
        row = self._rows.get(step)
        return (row[1], row[2]) if row is not None and row[3] == seconds else None

    def write(self, step: int, elapsed: float, progress: float, seconds: float) -> None:
        """Add a row; it is in the file when this returns."""
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(self._line((step, elapsed, progress, seconds)).encode())  # one call: whole or not at all
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _read(self) -> list[tuple[int, float, float, float]]:
        """The whole rows; damaged lines, such as a last one that was cut off, are left out."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be read: {error.strerror or error}; make it readable, or remove it."
            ) from error
        rows = []
        for line in text[: text.rfind("\n") + 1].splitlines()[1:]:
            try:
                step, *texts = line.split(",")
                elapsed, progress, seconds = map(float, texts)
                row = (int(step), elapsed, progress, seconds)
            except ValueError:  # after a power cut
                continue
            if math.isfinite(seconds) and 0.0 <= elapsed < math.inf and 0.0 <= progress <= 1.0:
                rows.append(row)
        return rows

    @staticmethod
    def _line(row: tuple[int, float, float, float]) -> str:
        return ",".join(map(repr, row)) + "\n"


def find_limit(trainer: Trainer) -> TimeLimit | None:
    """The run's time limit, if it has one."""
    return next((c for c in getattr(trainer, "callbacks", ()) if isinstance(c, TimeLimit)), None)


def planned_steps(trainer: Trainer, module: LightningModule) -> float | None:
    """The run's steps, an estimate where it ends with its time; None where they are not known."""
    limit = find_limit(trainer)
    steps: float = module.max_steps if limit is not None and limit.horizon == "time" else trainer.max_steps  # type: ignore[assignment]
    return steps if math.isfinite(steps) and steps > 0 else None
