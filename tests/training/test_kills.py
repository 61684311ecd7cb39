"""A run that is killed from outside, again and again and at any moment, ends as the run that nothing stops."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from nanochat.run import train
from tests.runs import configure, read_metrics, read_state, same

STEPS = 24
RUN = [
    f"trainer.max_steps={STEPS}", "trainer.val_check_interval=5", "callbacks.checkpoint.every_n_train_steps=1",
    "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress", "+mtp=on",
]  # fmt: skip
LIMIT = 120.0  # seconds for one process


def child(place: Path, folder: Path, started: Connection) -> None:
    torch.set_num_threads(1)
    cfg = configure(place, [*RUN, "ckpt_path=auto"])
    started.send(None)
    train(cfg, folder)


class Runs:
    """Starts the run in processes of their own; `kills` of them have been killed."""

    def __init__(self, place: Path) -> None:
        self.place, self.kills = place, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["nanochat.run", "tests.training.test_kills"])

    def start(self, folder: Path, seconds: float | None = None) -> float | None:
        """Kill it after `seconds`; returns how long it took, None when it was killed before its end."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=child, args=(self.place, folder, theirs))
        process.start()
        theirs.close()
        assert ours.poll(LIMIT)
        ours.recv()
        start = time.monotonic()
        process.join(LIMIT if seconds is None else seconds)
        if process.exitcode is None and process.pid is not None:
            assert seconds is not None, "it hangs"
            os.kill(process.pid, signal.SIGKILL)
            process.join(LIMIT)
        if process.exitcode == -signal.SIGKILL:
            self.kills += 1
            return None
        assert process.exitcode == 0
        return time.monotonic() - start


@pytest.mark.parametrize(
    "kills", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])], ids=lambda kills: f"{kills}"
)
def test_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    runs = Runs(tmp_path)
    whole = tmp_path / "whole"
    took = runs.start(whole)
    assert took is not None
    draw, number, resumed_from, lives = random.Random(kills), 0, [], 0
    while runs.kills < kills:
        number += 1
        folder = tmp_path / f"run {number}"
        while runs.kills < kills and runs.start(folder, draw.uniform(0.0, took)) is None:
            newest = folder / "checkpoints" / "last.ckpt"
            resumed_from.append(read_state(folder)["global_step"] if newest.exists() else 0)
        runs.start(folder)
        lives += 1
        assert read_metrics(folder) == read_metrics(whole)
        same(read_state(folder), read_state(whole))
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {path.name for path in (whole / "checkpoints").iterdir()}  # nothing half-written is left
        shutil.rmtree(folder)
    print(f"{runs.kills} kills of {lives} runs of {took:.1f} s; the newest checkpoint then was of step {resumed_from}")
    assert len(set(resumed_from)) > (1 if kills < 10 else 10)  # they have struck in many places
