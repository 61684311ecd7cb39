"""What a run shows of itself while it trains."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nanochat.console import clock_time
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.time_limit import find_limit, planned_steps

log = logging.getLogger(__name__)

LOSS_MEMORY = 0.9
"""of the shown loss, what is kept at each step"""


class DebiasedMean:
    """An exponential mean of finite numbers, weighted so that the first ones count in full.

    Args:
        memory: the share of the past that each number leaves, in [0, 1).
    """

    def __init__(self, memory: float) -> None:
        self.memory, self._total, self._weight = memory, 0.0, 0.0

    def add(self, value: float) -> None:
        """One more number; one that is not finite is left out."""
        if math.isfinite(value):
            self._total = self.memory * self._total + (1.0 - self.memory) * value
            self._weight = self.memory * self._weight + (1.0 - self.memory)

    @property
    def value(self) -> float:
        """NaN before the first."""
        return self._total / self._weight if self._weight else math.nan


class ProgressBar(StepCallback):
    """A bar on a terminal; elsewhere a line every few seconds. Place it after the throughput.

    The loss is an exponential mean over about ten steps, free of the start's bias: that of a single micro-batch
    scatters too much to be read.

    Args:
        every_n_seconds: between two lines in a log.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        self.every_n_seconds = every_n_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._logged = self._start = 0.0
        self._first = 0
        self._loss = DebiasedMean(LOSS_MEMORY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._logged = self._start = time.monotonic()
        self._first = trainer.global_step
        if sys.stderr.isatty():
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.fields[left]} left"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._task = self._bar.add_task("training", total=total, completed=self._first, numbers="", left="?")
            self._bar.start()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        metrics: dict[str, float] = pl_module.step_metrics  # type: ignore[assignment]
        self._loss.add(metrics.get("train/loss", math.nan))
        numbers = self._numbers(metrics)
        steps, left = planned_steps(trainer, pl_module), self._left(trainer, step)
        end = None if steps is None else round(steps)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=end, numbers=numbers, left=left)
        elif time.monotonic() - self._logged >= self.every_n_seconds or step == trainer.max_steps:
            self._logged = time.monotonic()
            log.info("step %d/%s  %s  %s left", step, "?" if end is None else end, numbers, left)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if found and not trainer.sanity_checking:
            log.info("step %d  %s", trainer.global_step, "  ".join(f"{k} {v:.4f}" for k, v in found.items()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _numbers(self, metrics: dict[str, float]) -> str:
        parts = [f"loss {self._loss.value:.4f}"]
        if "train/tokens_per_second" in metrics:
            parts.append(f"{metrics['train/tokens_per_second']:,.0f} tokens/s")
        if "train/mfu" in metrics:
            parts.append(f"MFU {metrics['train/mfu']:.1%}")
        return "  ".join(parts)

    def _left(self, trainer: Trainer, step: int) -> str:
        per_step, limit = (time.monotonic() - self._start) / max(1, step - self._first), find_limit(trainer)
        ends = [per_step * max(0, trainer.max_steps - step)] if trainer.max_steps > 0 else []
        return clock_time(min([*ends, limit.left()] if limit else ends, default=0.0))
