"""How fast the run is."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import LightningModule, Trainer

from nanochat import ranks
from nanochat.training.callbacks.base import StepCallback

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""dense bfloat16 (float16 where there is none) operations per second, from the makers' data sheets; first match wins"""


class Throughput(StepCallback):
    """Adds to the module's `step_metrics`: `train/tokens_per_second`, `train/data_wait` (the share of the time that
    was spent waiting for data), `optim/bytes`, and on CUDA `train/mfu` (of known GPUs) and `memory/peak_bytes`.

    Validation, sampling and saving do not count. Place it before the metrics.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._since = 0.0
        self._waited = 0.0
        self._paused = True
        self._flops_per_token = 0.0
        self._peak: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._paused, self._tokens = True, 0
        self._flops_per_token = flops_per_token(pl_module.gpt)  # type: ignore[arg-type]
        device = pl_module.device
        if device.type == "cuda":
            self._peak = peak_flops(torch.cuda.get_device_name(device))
            torch.cuda.reset_peak_memory_stats(device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._paused = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._paused:  # restart the clock at the moment before this batch was waited for
            waited = _wait_seconds(trainer)
            self._since = time.perf_counter() - (waited - self._waited)
            self._paused = False
        self._tokens += batch["tokens"].numel() * ranks.world()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        now, waited = time.perf_counter(), _wait_seconds(trainer)
        elapsed = max(now - self._since, 1e-9)
        speed = self._tokens / elapsed
        metrics: dict[str, float] = pl_module.step_metrics  # type: ignore[assignment]
        metrics["train/tokens_per_second"] = speed
        metrics["train/data_wait"] = min(1.0, (waited - self._waited) / elapsed)
        metrics["optim/bytes"] = trainer.optimizers[0].state_bytes()  # type: ignore[attr-defined]
        if pl_module.device.type == "cuda":
            metrics["memory/peak_bytes"] = torch.cuda.max_memory_allocated(pl_module.device)
            if self._peak is not None:
                metrics["train/mfu"] = speed * self._flops_per_token / (self._peak * ranks.world())
        self._since, self._waited, self._tokens = now, waited, 0


def _wait_seconds(trainer: Trainer) -> float:
    return float(getattr(trainer.train_dataloader, "wait_seconds", 0.0))


def peak_flops(name: str) -> float | None:
    """Operations per second of a GPU by its name; None of an unknown one."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def flops_per_token(gpt: Any) -> float:
    """Training FLOPs per token: 6 per weight of a matrix and 12 d T per layer for attention (PaLM, arXiv:2204.02311,
    appendix B); the embedding's lookup is free, the lm_head is not."""
    config = gpt.config
    matrices = sum(p.numel() for name, p in gpt.named_parameters() if p.ndim == 2 and name.startswith("blocks."))
    return 6.0 * (matrices + config.vocab_size * config.dim) + 12.0 * config.n_layers * config.dim * config.seq_len
