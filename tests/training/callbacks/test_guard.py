"""Steps without a finite gradient are dropped; many in a row return the run to a checkpoint."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.errors import UserError
from nanochat.optim.optimizer import Optimizer
from nanochat.run import train
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same
from tests.training.callbacks.short_runs import BARE


def poison(steps: set[int] | Callable[[int], bool]) -> Callable[..., Any]:
    """A training_step whose loss is NaN in these optimizer steps."""
    original = NanoChatModule.training_step

    def training_step(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        bad = steps(self.global_step) if callable(steps) else self.global_step in steps
        return loss * float("nan") if bad else loss

    return training_step


def test_a_step_without_a_finite_gradient_is_dropped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, states = place / "dropped", []
    original = NanoChatModule.optimizer_step

    def optimizer_step(self: NanoChatModule, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        original(self, epoch, batch_idx, optimizer, closure)
        states.append(copy.deepcopy([self.state_dict(), optimizer.optimizer.state_dict()["state"]]))

    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    monkeypatch.setattr(NanoChatModule, "training_step", poison({2}))
    train(configure(place, [*BARE, "trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=1"]), folder)
    skipped = [row["skipped_steps"] for row in read_metrics(folder) if row["train/loss"]]
    assert skipped == ["0", "0", "1", "1"]
    same(states[1], states[2])
    for one, other in ((0, 1), (2, 3)):
        assert not torch.equal(states[one][0]["gpt.embedding.weight"], states[other][0]["gpt.embedding.weight"])
    assert read_state(folder)["DataModule"]["consumed"] == 4
    assert not (folder / "checkpoints" / "step=3.ckpt").exists()  # it waited for a good step


def test_a_row_of_bad_steps_goes_back_with_half_the_rates(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = place / "back"
    attempts = []
    start = NanoChatModule.on_train_start

    def on_train_start(self: NanoChatModule) -> None:
        attempts.append((self.global_step, self.rate_scale))
        start(self)

    monkeypatch.setattr(NanoChatModule, "on_train_start", on_train_start)
    monkeypatch.setattr(NanoChatModule, "training_step", poison(lambda step: step >= 3 and len(attempts) < 3))
    settings = [*BARE, "callbacks.guard.patience=2", "trainer.val_check_interval=100", "trainer.max_steps=6"]
    with caplog.at_level(logging.WARNING):
        train(configure(place, [*settings, "schedule=constant", "schedule.warmup_steps=0"]), folder)
    assert attempts == [(0, 1.0), (2, 0.5), (2, 0.25)]
    assert caplog.text.count("Going back to") == 2
    rates = [float(row["train/lr"]) for row in read_metrics(folder) if row["train/lr"]]
    assert rates == [rates[0]] * 2 + [rates[0] / 4] * 4
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["nanochat_run"]["rate_scale"] == 0.25
    train(configure(place, [*settings, "ckpt_path=last", "schedule=constant", "schedule.warmup_steps=0",
                            "trainer.max_steps=7"]), folder)  # fmt: skip
    assert [float(row["train/lr"]) for row in read_metrics(folder) if row["train/lr"]] == [*rates, rates[0] / 4]


def test_a_run_that_always_diverges_gives_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NanoChatModule, "training_step", poison(lambda step: True))
    settings = [*BARE, "callbacks.guard.patience=2", "callbacks.guard.max_rollbacks=1"]
    with pytest.raises(UserError, match=r"diverges.*optim\.lr"):
        train(configure(place, settings), place / "diverged")
    assert json.loads((place / "diverged" / "summary.json").read_text())["status"] == "failed"


def test_a_finite_norm_spares_quantised_states_a_look(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each look at the gradients is a host sync, and the guard's own is enough."""
    monkeypatch.setattr(Optimizer, "gradients_fit", lambda self, groups: pytest.fail("looked"))
    train(configure(place, [*BARE, "optim=muon8bit", "trainer.max_steps=2"]), place / "spared")
    assert len([row for row in read_metrics(place / "spared") if row["train/loss"]]) == 2
