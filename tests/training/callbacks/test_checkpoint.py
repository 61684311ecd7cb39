"""What is saved when, and that a failed save harms nothing."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.errors import DivergedError, UserError
from nanochat.run import train
from nanochat.training.callbacks.checkpoint import Checkpoint
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_state
from tests.training.callbacks.short_runs import BARE


def test_weights_that_are_not_finite_are_never_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NanoChatModule.optimizer_step

    def optimizer_step(self: NanoChatModule, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.global_step == 3:
            with torch.no_grad():
                self.gpt.norm.weight[0] = float("inf")

    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    settings = [*BARE, "callbacks.guard.patience=100"]
    with pytest.raises(DivergedError, match=r"val/bpb is nan at step 5; lower optim\.lr") as caught:
        train(configure(place, settings), place / "infinite")
    assert caught.value.exit_code == 1
    assert json.loads((place / "infinite/summary.json").read_text())["status"] == "failed"
    assert {p.name for p in (place / "infinite/checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}


def test_a_failed_save_leaves_the_old_one_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, as far as the process can see: files may not grow beyond a limit."""
    folder = place / "full"
    original, count = torch.save, 0

    def save(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            return original(content, file)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            original(content, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(torch, "save", save)
    try:
        with pytest.raises(UserError, match=r"step 4 cannot be saved in .*: File too large"):
            train(configure(place, BARE), folder)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}
    assert read_state(folder)["global_step"] == 2


def test_an_exception_between_steps_saves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: NanoChatModule) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(NanoChatModule, "on_validation_epoch_end", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(configure(place, [*BARE, "callbacks.checkpoint.every_n_train_steps=100"]), place / "broken")
    assert read_state(place / "broken")["global_step"] == 2


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="keep=0"):
        Checkpoint(keep=0)


@pytest.mark.parametrize("keep", ["1", "2", "null"])
def test_damage_in_place_leaves_another_file(place: Path, keep: str) -> None:
    """From the second save on: no single file is all there is."""
    folder = place / f"keep-{keep}"
    train(configure(place, [*BARE, f"callbacks.checkpoint.keep={keep}", "trainer.max_steps=4"]), folder)
    files = {path.name: path.stat().st_ino for path in (folder / "checkpoints").iterdir()}
    assert len(files) == {"1": 2, "2": 3, "null": 3}[keep]
    assert len(set(files.values())) == 2
    assert read_state(folder)["global_step"] == 4
