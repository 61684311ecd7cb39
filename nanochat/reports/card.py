"""The end of a run: its report card on the screen, and summary.json."""

from __future__ import annotations

import json
import logging
import math
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from rich.console import Console
from rich.table import Table

from nanochat import __version__
from nanochat.config.schema import in_sweep, places_of_user
from nanochat.console import clock_time
from nanochat.errors import UserError
from nanochat.files import atomic_write, shown
from nanochat.reports.curves import curve
from nanochat.reports.header import (
    describe_machine,
    describe_model,
    describe_optimizer,
    describe_techniques,
    peak_resident_bytes,
    tokens_per_step,
)
from nanochat.reports.loggers import log_summary
from nanochat.reports.origin import origin
from nanochat.run_folder import as_float, read_metrics

log = logging.getLogger(__name__)


class RunReport:
    """Tells how a run went.

    Args:
        folder: the run's folder.
        plain_cfg: its resolved configuration.
        data: its data module: `describe()` and `compression` (compressor -> bits per byte of the validation text).
        limit: its time limit, if it has one: `elapsed()`, `seconds` and `horizon`.

    Build it when the run starts: it takes the time. summary.json is one flat mapping: `status` (finished, pruned,
    stopped, failed), `step`, the last metrics by their names in metrics.csv, `parameters`, `tokens`, `seconds`, `data`,
    what `origin` says, `commit`, `machine`, the versions; of a single run `peak_resident_bytes`, and of one with a
    time limit `trained_seconds` and `max_seconds`, too.
    """

    def __init__(self, folder: Path, plain_cfg: dict[str, Any], data: Any, limit: Any = None) -> None:
        self.folder, self.cfg, self.data, self.limit = Path(folder), plain_cfg, data, limit
        self.start = time.monotonic()
        self.parameters: int | None = None

    def finish(self, trainer: Trainer, module: torch.nn.Module, status: str = "finished") -> dict[str, float]:
        """Write summary.json, show the card, and return the final metrics."""
        self.parameters = sum(p.numel() for p in module.parameters())
        metrics = self._metrics(trainer)
        self._summary(status, trainer, metrics)
        self._card(trainer, module, metrics)
        return metrics

    def abort(self, trainer: Trainer | None, error: BaseException) -> None:
        """Write the summary.json of a run that did not come to its end."""
        if trainer is None or not self.folder.is_dir():
            return
        stopped = isinstance(error, KeyboardInterrupt) or (
            isinstance(error, SystemExit) and error.code in (130, 143, 75)
        )
        metrics = self._metrics(trainer)
        try:
            self._summary("stopped" if stopped else "failed", trainer, metrics, error=None if stopped else error)
        except (OSError, UserError) as second:  # the first error is the one to report
            log.warning("summary.json was not written: %s", second)

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        """The last finite-or-not value of each column of metrics.csv, and what the trainer holds."""
        rows = read_metrics(self.folder / "metrics.csv")
        metrics: dict[str, float] = {}
        for row in rows:
            metrics.update({k: v for k, text in row.items() if k != "step" and (v := as_float(text)) is not None})
        speeds = [speed for _, speed in curve(rows, "train/tokens_per_second")][-200:]
        if speeds:  # one step's is noise
            metrics["train/tokens_per_second"] = len(speeds) / sum(1.0 / max(s, 1e-9) for s in speeds)
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                metrics[name] = float(value)
        if trainer.optimizers and hasattr(trainer.optimizers[0], "state_bytes"):
            metrics["optim/bytes"] = trainer.optimizers[0].state_bytes()  # type: ignore[attr-defined]
            metrics["skipped_steps"] = trainer.optimizers[0].skipped_steps  # type: ignore[attr-defined]
        return metrics

    def _tokens(self, trainer: Trainer) -> int:
        return trainer.global_step * tokens_per_step(self.cfg)

    def _summary(
        self, status: str, trainer: Trainer, metrics: dict[str, float], error: BaseException | None = None
    ) -> None:
        numbers = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        content: dict[str, Any] = {
            "status": status,
            "step": trainer.global_step,
            **numbers,
            "parameters": self.parameters
            or (sum(p.numel() for p in trainer.model.parameters()) if trainer.model is not None else None),
            "tokens": self._tokens(trainer),
            "seconds": round(time.monotonic() - self.start, 3),
            "data": self.data.describe(),
            "compression": dict(self.data.compression) if status in ("finished", "pruned") else {},
            "task_name": self.cfg.get("task_name"),
            **origin(self.folder),
            "commit": commit(),
            "nanochat": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "machine": describe_machine(trainer.strategy.root_device),
        }
        if self.limit is not None:
            content["trained_seconds"] = round(self.limit.elapsed(), 3)
            content["max_seconds"] = self.limit.seconds
        if not in_sweep() and (peak := peak_resident_bytes()):  # the jobs of a sweep share a process
            content["peak_resident_bytes"] = peak
        if not content["compression"]:
            del content["compression"]
        if error is not None:
            content["error"] = f"{type(error).__name__}: {error}"
        log_summary(trainer.loggers, content)
        try:
            with atomic_write(self.folder / "summary.json") as file:
                file.write((json.dumps(content, indent=1) + "\n").encode())
        except OSError as failure:
            raise UserError(
                f"{self.folder / 'summary.json'} cannot be written: {failure.strerror or failure}."
            ) from failure

    def _card(self, trainer: Trainer, module: torch.nn.Module, metrics: dict[str, float]) -> None:
        place = shown(self.folder)
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        table.add_row("model", describe_model(self.cfg, self.parameters))
        if techniques := describe_techniques(self.cfg, trainer, module):
            table.add_row("techniques", techniques)
        table.add_row("data", self.data.describe())
        size = f", {metrics['optim/bytes'] / 1e6:,.1f} MB of state" if "optim/bytes" in metrics else ""
        table.add_row("optimizer", f"{describe_optimizer(self.cfg, trainer.optimizers)}{size}")
        table.add_row(
            "trained",
            f"{trainer.global_step:,} steps, {self._tokens(trainer):,} tokens; this session took "
            f"{clock_time(time.monotonic() - self.start)}",
        )
        if self.limit is not None:
            used, whole = self.limit.elapsed(), self.limit.seconds
            table.add_row("time", f"{clock_time(used)} of {clock_time(whole)} used, {used / whole:.1%}")
        if "train/tokens_per_second" in metrics:
            wait = metrics.get("train/data_wait", 0.0)
            table.add_row("speed", f"{metrics['train/tokens_per_second']:,.0f} tokens/s, {wait:.1%} waiting for data")
        if metrics.get("skipped_steps"):
            spikes = metrics.get("spikes", 0.0)
            bad = f"{metrics['skipped_steps'] - spikes:,.0f} steps without a finite gradient"
            table.add_row("skipped", f"{bad}, {spikes:,.0f} that stood out" if "spikes" in metrics else bad)
        if "val/loss" in metrics:
            table.add_row("val/loss", f"{metrics['val/loss']:.4f} nats per token")
        if "val/bpb" in metrics:
            beside = "".join(f", {name} {value:.3f}" for name, value in self.data.compression.items())
            table.add_row("val/bpb", f"{metrics['val/bpb']:.4f} bits per byte of text{beside}")
        table.add_row("folder", place)
        last = self.folder / "checkpoints" / "last.ckpt"
        if last.exists():
            prompt = "def " if self.cfg["data"].get("corpus") in ("stdlib", "code") else "The "
            table.add_row("next", f"nanochat generate {place} --prompt '{prompt}'")
            table.add_row("", " ".join(["nanochat train --resume", place, *self._longer(trainer), *places_of_user()]))
            table.add_row("", f"nanochat export {place}")
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 120
        console.print()
        console.print(table)

    def _longer(self, trainer: Trainer) -> list[str]:
        """The override that makes the run twice as long; none where it ended before its time."""
        if self.limit is not None and self.limit.horizon == "time":
            return [f"trainer.max_time={math.ceil(2 * self.limit.seconds)}s"]
        early = trainer.global_step < trainer.max_steps
        return [] if early else [f"trainer.max_steps={2 * trainer.global_step}"]


def commit() -> str | None:
    """The commit of the code that ran, with `-dirty` after local changes; None outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
