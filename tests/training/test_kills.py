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
from typing import Any

import pytest
import torch

from nanochat.run import train
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same

STEPS = 24
RUN = [
    f"trainer.max_steps={STEPS}", "trainer.val_check_interval=5", "callbacks.checkpoint.every_n_train_steps=1",
    "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress", "+mtp=on",
]  # fmt: skip
LIMIT = 120.0  # seconds for one process


def child(place: Path, folder: Path, beats: Connection) -> None:
    """The run, which says when it begins and when each of its steps does."""
    torch.set_num_threads(1)
    original = NanoChatModule.training_step

    def training_step(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        beats.send(None)
        return original(self, batch, batch_idx)

    NanoChatModule.training_step = training_step
    cfg = configure(place, [*RUN, "ckpt_path=auto"])
    beats.send(None)
    train(cfg, folder)


class Runs:
    """Starts the run in processes of their own; `kills` of them have been killed."""

    def __init__(self, place: Path) -> None:
        self.place, self.kills = place, 0
        self.begins, self.step = 0.0, 0.0
        """seconds until the first step, and of each"""
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["nanochat.run", "tests.training.test_kills"])

    def start(self, folder: Path, steps: int = STEPS + 1, part: float = 0.0) -> bool:
        """Kill it when it has begun `steps` of its steps and a part of another, or of what comes before the first.

        Returns whether it came to its end before that.
        """
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=child, args=(self.place, folder, theirs))
        process.start()
        theirs.close()
        times = []
        try:
            for _ in range(steps + 1):
                assert ours.poll(LIMIT)
                ours.recv()
                times.append(time.monotonic())
            process.join(part * (2 * self.step if steps else self.begins))
        except EOFError:  # there were fewer steps to do
            process.join(LIMIT)
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            process.join(LIMIT)
        if process.exitcode == -signal.SIGKILL:
            self.kills += 1
            return False
        assert process.exitcode == 0
        if len(times) == STEPS + 1 and not self.step:
            self.begins, self.step = times[1] - times[0], (times[-1] - times[1]) / STEPS
        return True


@pytest.mark.parametrize(
    "kills", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])], ids=lambda kills: f"{kills}"
)
def test_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    runs, whole = Runs(tmp_path), tmp_path / "whole"
    assert runs.start(whole)
    draw, resumed_from, lives = random.Random(kills), [], 0
    while runs.kills < kills:
        lives += 1
        folder, ended = tmp_path / f"run {lives}", False
        while runs.kills < kills and not ended:
            ended = runs.start(folder, draw.randrange(9), draw.random())
            newest = folder / "checkpoints" / "last.ckpt"
            if not ended:
                resumed_from.append(read_state(folder)["global_step"] if newest.exists() else 0)
        assert ended or runs.start(folder)
        assert read_metrics(folder) == read_metrics(whole)
        same(read_state(folder), read_state(whole))
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {path.name for path in (whole / "checkpoints").iterdir()}  # nothing half-written is left
        shutil.rmtree(folder)
    print(f"{runs.kills} kills in {lives} runs; the newest checkpoint was then of step {resumed_from}")
    assert len(set(resumed_from)) > (1 if kills < 10 else 10)  # they have struck in many places
