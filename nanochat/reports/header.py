"""The beginning of a run: what is about to be trained, and how long it will take."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from nanochat.console import clock_time
from nanochat.files import shown
from nanochat.training.callbacks.base import StepCallback

log = logging.getLogger(__name__)

WARM_UP = 2  # steps whose time says little
SAMPLE_SECONDS = 2.0  # of the steps that are timed after them


class Header(StepCallback):
    """Logs model, data, optimizer, precision, device, steps and folder before the first step, and the time that the run
    will take once a few steps are timed; the bar and the log's lines have the time left from then on.

    Args:
        plain_cfg: the run's settled configuration.
        data: its data module: `describe()`.
    """

    def __init__(self, plain_cfg: dict[str, Any], data: Any) -> None:
        self.cfg, self.data = plain_cfg, data
        self._shown = False
        self._timed_from: tuple[int, float] | None = None
        self._estimated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first = trainer.global_step
        if not self._shown:  # again after a return to a checkpoint
            self._shown = True
            lines = [f"{name:<10} {text}" for name, text in self._rows(trainer, pl_module).items()]
            log.info("\n%s", "\n".join(lines))

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._estimated or step < self._first + WARM_UP:
            return
        now = time.monotonic()
        if self._timed_from is None:
            self._timed_from = (step, now)
            return
        since, start = self._timed_from
        left = trainer.max_steps - step
        if now - start >= SAMPLE_SECONDS and left > 0:
            self._estimated = True
            took = clock_time((now - start) / (step - since) * left)
            log.info("about %s for the %s steps left, without validation and saving", took, f"{left:,}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timed_from = None  # time the steps after it

    def _rows(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        model, optim, settings = self.cfg["model"], self.cfg["optim"], self.cfg["trainer"]
        parameters = sum(p.numel() for p in module.parameters())
        kind = "ternary" if model.get("ternary") else "float"
        rules = dict.fromkeys(group["rule"] for group in trainer.optimizers[0].param_groups)
        accumulated = int(settings.get("accumulate_grad_batches", 1))
        per_step = accumulated * int(self.cfg["data"]["batch_size"]) * int(self.cfg["data"]["seq_len"])
        from_step = f", from step {trainer.global_step:,}" if trainer.global_step else ""
        return {
            "model": f"{self.cfg.get('task_name', '')}: {kind}, {parameters:,} parameters, width {model['dim']}, "
                     f"{model['n_layers']} layers",
            "data": self.data.describe(),
            "optimizer": f"{' + '.join(rules)}, lr {optim['lr']:g}",
            "precision": f"{settings.get('precision')} on {module.device}",
            "steps": f"{trainer.max_steps:,} of {per_step:,} tokens{from_step}",
            "folder": shown(Path(trainer.default_root_dir)),
        }  # fmt: skip
