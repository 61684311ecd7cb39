"""The beginning of a run: what is about to be trained, and how long it will take."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from nanochat import ranks
from nanochat.config.schema import set_by_user
from nanochat.console import clock_time
from nanochat.files import shown
from nanochat.reports.header import describe_model, describe_optimizer, describe_techniques, tokens_per_step
from nanochat.training.callbacks.base import StepCallback
from nanochat.training.callbacks.time_limit import find_limit

log = logging.getLogger(__name__)

WARM_UP = 2  # steps whose time says little
SAMPLE_SECONDS = 2.0  # of the steps that are timed after them


class Header(StepCallback):
    """Logs model, data, optimizer, precision, device, steps and folder before the first step, and how long the run will
    take as soon as a few steps have been timed.

    Args:
        plain_cfg: the run's settled configuration.
        data: its data module: `describe()`.
    """

    def __init__(self, plain_cfg: dict[str, Any], data: Any) -> None:
        self.cfg, self.data = plain_cfg, data
        self._shown = False
        self._first = 0
        self._timed_from: tuple[int, float] | None = None
        self._estimated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first, self._timed_from = trainer.global_step, None
        if self._shown or trainer.should_stop or trainer.global_step >= trainer.max_steps >= 0:
            return  # not again after a return to a checkpoint
        self._shown = True
        rows = [f"{name:<10} {text}" for name, text in self.rows(trainer, pl_module).items()]
        log.info("About to train\n%s", "\n".join(rows))

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._estimated or step < self._first + WARM_UP:
            return
        now, left, limit = time.monotonic(), trainer.max_steps - step, find_limit(trainer)
        if self._timed_from is None:
            self._timed_from = (step, now)
            return
        since, start = self._timed_from
        if now - start < SAMPLE_SECONDS:
            return
        pace = (now - start) / (step - since)
        self._estimated = True
        if limit is not None and not 0 < left * pace <= limit.left():
            time_left = clock_time(limit.left())
            log.info(
                "about %s steps in the %s left, without validations and saves", f"{limit.left() / pace:,.0f}", time_left
            )
            self._compare_warmup(limit.seconds / pace)
        elif left > 0:
            took = clock_time(pace * left)
            steps = f"{left:,} step{'s' * (left > 1)}"
            log.info("about %s for the %s left, without validations and saves", took, steps)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timed_from = None  # only steps in a row are timed

    def _compare_warmup(self, steps: float) -> None:
        """Say so where the run, of about so many steps, has no time for the warm-up that the user has set."""
        schedule = self.cfg.get("schedule") or {}
        warmup, most = schedule.get("warmup_steps") or 0, steps / 10
        if schedule.get("horizon") == "time" and warmup > most and set_by_user("schedule.warmup_steps"):
            log.warning(
                "schedule.warmup_steps=%d is cut to a tenth of trainer.max_time, about %s steps.",
                warmup,
                f"{most:,.0f}",
            )

    @staticmethod
    def _steps(trainer: Trainer) -> str:
        if trainer.max_steps <= 0:
            return "as many as fit,"
        return f"{'at most ' if find_limit(trainer) else ''}{trainer.max_steps:,}"

    @staticmethod
    def _time(trainer: Trainer) -> str:
        limit = find_limit(trainer)
        if limit is None:
            return "estimated after the first steps"
        used = f", {clock_time(limit.elapsed())} of it used" if limit.elapsed() >= 1.0 else ""
        return f"{clock_time(limit.seconds)}{used}; the last validation and save are within it"

    def rows(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        """Name -> text."""
        settings, done = self.cfg["trainer"], trainer.global_step
        techniques = describe_techniques(self.cfg, trainer, module)
        return {
            "model": describe_model(self.cfg, sum(p.numel() for p in module.parameters())),
            **({"techniques": techniques} if techniques else {}),
            "data": self.data.describe(),
            "optimizer": describe_optimizer(self.cfg, trainer.optimizers),
            "precision": str(settings.get("precision")),
            "device": str(module.device) if ranks.world() == 1 else f"{ranks.world()} ranks, {module.device.type}",
            "steps": f"{self._steps(trainer)} of {tokens_per_step(self.cfg):,} tokens"
                     f"{f'; {done:,} are done' if done else ''}",
            "time": self._time(trainer),
            "folder": shown(Path(trainer.default_root_dir)),
        }  # fmt: skip
