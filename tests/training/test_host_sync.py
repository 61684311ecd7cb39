"""A step of training waits for the device once, and a validation once, whatever its length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanochat.run import train
from nanochat.training.callbacks.throughput import Throughput
from tests.host_reads import host_reads
from tests.runs import configure

QUIET = ["~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.ternary_health", "~callbacks.checkpoint",
         "trainer.num_sanity_val_steps=0"]  # fmt: skip


ON_A_CPU_ALONE = {"_probabilities", "arrived"}
"""functions that ask for the device's type before they read"""


def reads_of(place: Path, name: str, overrides: list[str]) -> Counter[str]:
    """Who in a run has read the device while it trained, and how often."""
    with host_reads() as reads:
        train(configure(place, [*QUIET, *overrides]), place / name)
    return Counter(reads.places)


def per_step(place: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The reads from the end of one optimizer step to the end of the next."""
    settings = [*QUIET, *overrides, "trainer.limit_val_batches=0", "trainer.max_steps=3"]
    marks: list[int] = []
    original = Throughput.on_step_end

    def on_step_end(self: Throughput, *args: Any) -> None:
        original(self, *args)
        marks.append(len(reads.places))

    monkeypatch.setattr(Throughput, "on_step_end", on_step_end)
    with host_reads() as reads:
        train(configure(place, settings), place / "run")
    assert len(marks) == 3
    return Counter(who for who in reads.places[marks[1] : marks[2]] if who not in ON_A_CPU_ALONE)


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "optim=muon8bit",
            "+mtp=on",
            "+collider=on",
            "trainer.accumulate_grad_batches=2",
            "callbacks.guard.spike_sigma=6",
            "callbacks.guard.spike_window=4",
        ],
        ["~callbacks.guard", "optim=lion"],
    ],
    ids=" ".join,
)
def test_a_step_reads_once(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert per_step(tmp_path, overrides, monkeypatch) == {"read_numbers": 1}


def test_a_validation_reads_as_often_whatever_its_length(tmp_path: Path) -> None:
    settings = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    short = reads_of(tmp_path, "short", [*settings, "trainer.limit_val_batches=1"])
    long = reads_of(tmp_path, "long", [*settings, "trainer.limit_val_batches=3"])
    assert short == long
    assert short["validation_step"] == 0
    assert short["on_validation_epoch_end"] == 1
