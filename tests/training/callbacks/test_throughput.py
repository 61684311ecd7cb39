"""Tokens per second, data wait and FLOPs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.model import GPT, GPTConfig
from nanochat.training.callbacks import throughput
from nanochat.training.callbacks.throughput import Throughput, flops_per_token


def test_speed_counts_each_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 2 x 40 tokens in 4 s, 1 s of it waiting for data; between them a validation of 100 s."""
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    loader = SimpleNamespace(wait_seconds=0.0)
    trainer: Any = SimpleNamespace(
        global_step=0, train_dataloader=loader, optimizers=[SimpleNamespace(state_bytes=lambda: 12)]
    )
    config = GPTConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, seq_len=32)
    module: Any = SimpleNamespace(gpt=GPT(config), device=torch.device("cpu"), step_metrics={})
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for step in (1, 2):
        for micro_step in range(2):
            now, loader.wait_seconds = now + 0.5, loader.wait_seconds + 0.5
            callback.on_train_batch_start(trainer, module, {"tokens": torch.zeros(2, 20)}, 0)
            now += 1.5
            trainer.global_step += micro_step
            callback.on_train_batch_end(trainer, module, None, None, 0)
        assert module.step_metrics == {
            "train/tokens_per_second": 20.0, "train/data_wait": 0.25, "optim/bytes": 12
        }, step  # fmt: skip
        callback.on_validation_start(trainer, module)
        now += 100.0


def test_operations_per_token_against_a_count_by_hand() -> None:
    config = GPTConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, seq_len=32)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert flops_per_token(GPT(config)) == 6 * (2 * layer + 100 * 64) + 12 * 2 * 64 * 32
