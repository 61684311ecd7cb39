"""Whole runs whose optimizer state is in another memory: the same to the last bit, and moved at a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat.optim.offload import Away
from nanochat.run import train
from tests.runs import configure, read_state, same

RUN = ["~callbacks.ternary_health", "~callbacks.loss_plot", "~callbacks.sampler", "schedule=constant",
       "schedule.warmup_steps=0", "callbacks.checkpoint.every_n_train_steps=2", "optim=muon8bit",
       "trainer.max_steps=4", "trainer.val_check_interval=4"]  # fmt: skip


def test_a_run_moves_its_state_at_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(configure(tmp_path, RUN), tmp_path / "whole")
    for module in ("offload", "optimizer"):
        monkeypatch.setattr(f"nanochat.optim.{module}.leaves", lambda device: True)
    monkeypatch.setattr("nanochat.optim.offload.SMALLEST", 4096)
    visits: list[Away] = []
    visiting = Away.visiting
    monkeypatch.setattr(Away, "visiting", lambda state: visits.append(state) or visiting(state))

    step_2 = f"ckpt_path='{tmp_path}/whole/checkpoints/step=2.ckpt'"
    train(configure(tmp_path, [*RUN, "offload_optimizer=true", step_2]), tmp_path / "away")
    assert visits
    same(read_state(tmp_path / "whole"), read_state(tmp_path / "away"))

    train(configure(tmp_path, [*RUN, "offload_optimizer=true", "trainer.max_steps=2"]), tmp_path / "first")
    count = len(visits)
    train(configure(tmp_path, [*RUN, "ckpt_path=last"]), tmp_path / "first")
    assert len(visits) == count
    same(read_state(tmp_path / "whole"), read_state(tmp_path / "first"))
