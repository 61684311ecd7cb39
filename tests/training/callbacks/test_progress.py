"""The loss that a bar and a log show."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.training.callbacks.progress import DebiasedMean, ProgressBar


def test_the_mean_counts_the_first_in_full() -> None:
    """Against the definition: weights that fall by `memory` with age, normalised."""
    mean, values = DebiasedMean(0.9), [8.0, 7.0, 7.5, 6.0, 6.5]
    assert math.isnan(mean.value)
    for count in range(1, len(values) + 1):
        mean.add(values[count - 1])
        weights = [0.9 ** (count - 1 - i) for i in range(count)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert mean.value == pytest.approx(expected)
    mean.add(math.nan)
    mean.add(math.inf)
    assert mean.value == pytest.approx(expected)


def test_a_log_s_loss_is_that_mean(caplog: pytest.LogCaptureFixture) -> None:
    trainer: Any = SimpleNamespace(global_step=0, max_steps=4)
    module: Any = SimpleNamespace(step_metrics={})
    bar = ProgressBar(every_n_seconds=0.0)
    bar.on_train_start(trainer, module)
    with caplog.at_level(logging.INFO):
        for step, loss in enumerate((5.0, 6.0, 5.0, 6.0), 1):
            module.step_metrics = {"train/loss": loss}
            bar.on_step_end(trainer, module, step)
    shown = [float(record.message.split("loss ")[1].split()[0]) for record in caplog.records]
    second = (0.9 * 5.0 + 6.0) / 1.9
    assert shown[:2] == [5.0, pytest.approx(second, abs=1e-4)]
    assert 5.2 < shown[2] < 5.5 < shown[3] < 5.6
