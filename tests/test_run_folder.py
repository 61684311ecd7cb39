"""The link to the latest run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.run import train
from nanochat.run_folder import as_float, as_number, point_latest
from nanochat.training.module import NanoChatModule
from tests.runs import configure
from tests.training.callbacks.short_runs import BARE


def test_latest_is_the_run_that_was_resumed(tmp_path: Path) -> None:
    place, outputs = tmp_path, tmp_path / "outputs"
    settings = [*BARE, "trainer.max_steps=1"]
    for name in ("one", "two"):
        train(configure(place, settings), outputs / name)
    assert os.readlink(outputs / "latest") == "two"
    train(configure(place, [*settings, "trainer.max_steps=2", "ckpt_path=last"]), outputs / "one")
    assert os.readlink(outputs / "latest") == "one"


def test_latest_stays_out_of_other_folders(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    point_latest(tmp_path / "elsewhere" / "run")
    assert not list(tmp_path.rglob("latest"))
    for name in ("one", "two"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        point_latest(tmp_path / "outputs" / name)
        assert os.readlink(tmp_path / "outputs" / "latest") == name
    (tmp_path / "outputs" / "latest").unlink()
    (tmp_path / "outputs" / "latest").mkdir()
    point_latest(tmp_path / "outputs" / "one")
    assert not (tmp_path / "outputs" / "latest").is_symlink()


def test_latest_moves_when_there_is_something_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, when the run has a checkpoint."""
    place, outputs = tmp_path, tmp_path / "outputs"
    original, seen = NanoChatModule.training_step, []

    def training_step(self: NanoChatModule, *args: Any) -> torch.Tensor:
        seen.append(os.readlink(outputs / "latest") if (outputs / "latest").is_symlink() else None)
        return original(self, *args)

    train(configure(place, [*BARE, "trainer.max_steps=1"]), outputs / "one")
    monkeypatch.setattr(NanoChatModule, "training_step", training_step)
    train(configure(place, [*BARE, "trainer.max_steps=4"]), outputs / "two")
    assert seen == ["one", "one", "two", "two"]


@pytest.mark.parametrize(
    ("text", "number"), [("1.5", 1.5), (2, 2.0), ("", None), (None, None), ("1.", 1.0), ("x", None), ([], None)]
)
def test_numbers_of_a_run(text: Any, number: float | None) -> None:
    assert as_number(text) == as_float(text) == number


def test_numbers_that_are_not_finite() -> None:
    for text in ("nan", "inf", "-inf", 10**400):
        assert as_number(text) is None
    assert as_float("inf") == math.inf
    assert as_float(10**400) is None
