"""Thinning and smoothing of curves."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from nanochat.reports.curves import plot_loss, smooth, thin


def test_curves() -> None:
    points = [(i, float(i % 2)) for i in range(1, 10_001)]
    thinned = thin(points)
    assert len(thinned) == 2000
    assert thinned[0] == (5, 0.6)
    assert [value for _, value in smooth([(1, 2.0), (2, 2.0), (3, 2.0)])] == [2.0, 2.0, 2.0]
    assert smooth(points)[-1][1] == pytest.approx(0.5, abs=0.01)
    assert smooth([]) == []


@pytest.mark.parametrize("steps", [400, 2000])
def test_the_smoothed_line_does_not_lag(steps: int) -> None:
    """Behind a loss that falls as in training, with the scatter of single batches."""
    draw = random.Random(0)
    loss = [3.0 + 5.0 * math.exp(-10.0 * i / steps) for i in range(steps)]
    scattered = [(i, value + draw.choice((-1.0, 1.0)) * 0.5) for i, value in enumerate(loss)]
    smoothed = [value for _, value in smooth(scattered)]
    assert sum(s - value for s, value in zip(smoothed, loss, strict=True)) / steps == pytest.approx(0.0, abs=0.03)
    for i in range(steps // 20, steps):  # the mean of the past alone is up to 0.8 above
        assert smoothed[i] == pytest.approx(loss[i], abs=0.3), i


def test_the_plot_has_one_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss,val/bpb\n1,5.0,,\n1,,4.5,2.25\n")
    texts: list[str] = []
    monkeypatch.setattr(Axes, "set", lambda self, **named: texts.extend(named.values()))
    plot_loss(tmp_path)
    assert "nats per token" in texts
    assert any(text.endswith(": val/loss 4.5000 nats per token at step 1") for text in texts)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
