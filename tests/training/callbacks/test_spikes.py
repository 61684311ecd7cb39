"""Steps that stand out."""

from __future__ import annotations

import logging
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.errors import UserError
from nanochat.run import train
from nanochat.training.callbacks.spikes import SpikeWindow
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same
from tests.training.callbacks.short_runs import BARE


def draws(count: int) -> list[tuple[float, float]]:
    """Losses and norms with some spikes and some near ones."""
    draw = random.Random(3)
    pairs = []
    for step in range(count):
        loss, norm = 4.0 - step / 200 + draw.gauss(0, 0.05), 1.0 + draw.gauss(0, 0.1)
        if draw.random() < 0.03:
            loss += draw.choice((0.2, 0.5, 3.0, -2.0))
        if draw.random() < 0.03:
            norm += draw.choice((0.5, 0.8, 5.0, -0.9))
        pairs.append((loss, norm))
    return pairs


@pytest.mark.parametrize(("sigma", "window"), [(6.0, 128), (3.0, 16), (4.5, 5)])
def test_brute_force_in_float64(sigma: float, window: int) -> None:
    found, seen, spikes = SpikeWindow(sigma, window), [], 0
    for pair in draws(400):
        loss, norm = (torch.tensor(value, dtype=torch.float32) for value in pair)
        expected = False
        if len(seen) >= window // 2:
            recent = list(zip(*seen[-window:], strict=True))
            expected = any(
                new - statistics.fmean(known) > sigma * statistics.stdev(known)
                for new, known in zip(pair, recent, strict=True)
            )
        assert bool(found.is_spike(loss, norm)) == expected
        spikes += expected
        seen.append(pair)
        found.add(loss, norm)
    assert 3 < spikes < 100


def test_what_is_not_finite_is_not_a_spike_and_a_state_continues() -> None:
    window, again = SpikeWindow(3.0, 8), SpikeWindow(3.0, 8)
    for pair in draws(21):
        window.add(*map(torch.tensor, pair))
    assert not window.is_spike(torch.tensor(math.nan), torch.tensor(1.0))
    assert not window.is_spike(torch.tensor(4.0), torch.tensor(math.inf))
    again.load_state_dict(window.state_dict())
    for pair in draws(60)[21:]:
        pair_now = [torch.tensor(value) for value in pair]
        assert window.is_spike(*pair_now) == again.is_spike(*pair_now)
        window.add(*pair_now)
        again.add(*pair_now)
    other = SpikeWindow(3.0, 9)
    other.load_state_dict(window.state_dict())
    assert not other.is_spike(torch.tensor(1e9), torch.tensor(1.0)), "another length begins anew"


def test_a_spike_is_skipped_counted_and_exact_on_resume(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = NanoChatModule.training_step

    def training_step(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        return loss * 1e4 if self.global_step in (9, 12) else loss

    monkeypatch.setattr(NanoChatModule, "training_step", training_step)
    settings = [
        *BARE, "callbacks.guard.spike_window=8", "callbacks.guard.spike_sigma=6", "trainer.max_steps=14",
        "trainer.val_check_interval=100", "callbacks.checkpoint.every_n_train_steps=6", "schedule=constant",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(configure(place, settings), place / "spikes")
    rows = read_metrics(place / "spikes")
    assert [int(row["skipped_steps"]) for row in rows if row["train/loss"]] == [0] * 9 + [1] * 5
    assert "Step 10 stands out and is skipped: loss " in caplog.text
    assert rows[13]["spikes"] == "1", "the second lies within what the first has made of the deviation"

    checkpoint = f"ckpt_path='{place}/spikes/checkpoints/step=6.ckpt'"
    train(configure(place, [*settings, checkpoint]), place / "spikes_resumed")
    same(read_state(place / "spikes"), read_state(place / "spikes_resumed"))
    train(configure(place, [*settings, "callbacks.guard.spike_sigma=null"]), place / "no_spikes")
    assert "spikes" not in read_metrics(place / "no_spikes")[0]
    assert read_metrics(place / "no_spikes")[8]["train/loss"] == rows[8]["train/loss"]


def test_bad_values() -> None:
    with pytest.raises(UserError, match=r"callbacks\.guard\.spike_sigma=0 .*spike_window=128"):
        SpikeWindow(0)
    with pytest.raises(UserError, match=r"spike_window=3 at least 4"):
        SpikeWindow(6, 3)
