"""trainer.max_time."""

from __future__ import annotations

from pathlib import Path

from nanochat.run import train
from tests.runs import configure, read_metrics, read_state
from tests.training.callbacks.short_runs import BARE


def test_time_limit_ends_at_a_step_and_saves(place: Path) -> None:
    folder = place / "timed"
    settings = ["trainer.max_steps=100000", "trainer.max_time=00:00:00:01", "trainer.accumulate_grad_batches=3"]
    metrics = train(configure(place, [*BARE, *settings, "trainer.val_check_interval=100000"]), folder)
    state, rows = read_state(folder), read_metrics(folder)
    assert 0 < state["global_step"] < 100_000
    assert state["DataModule"]["consumed"] == 3 * state["global_step"]
    assert int(rows[-1]["step"]) == state["global_step"]
    assert float(rows[-1]["val/loss"]) == metrics["val/loss"]
