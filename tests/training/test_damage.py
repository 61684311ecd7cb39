"""A damaged checkpoint ends in the exact losses of an undisturbed run, or in one sentence that names the damage."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.errors import UserError
from nanochat.run import train
from nanochat.training.module import NanoChatModule
from nanochat.training.resume import checkpoint_to_resume
from tests.runs import configure, read_metrics, read_state, same

RUN = [
    "trainer.max_steps=6", "trainer.val_check_interval=4", "callbacks.checkpoint.every_n_train_steps=2",
    "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress",
]  # fmt: skip
KINDS = ("bytes", "block", "end")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The undisturbed run."""
    train(configure(place, RUN), place / "whole")
    return place / "whole"


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    """A run that crashed in its sixth step; its checkpoints are of the steps 2 and 4."""
    original, count = NanoChatModule.training_step, 0

    def training_step(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 6:
            raise ZeroDivisionError
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NanoChatModule, "training_step", training_step)
        with pytest.raises(ZeroDivisionError):
            train(configure(place, RUN), place / "stopped")
    return place / "stopped"


def copy_run(run: Path, to: Path) -> Path:
    """With last.ckpt a hard link of the newest, as in the run itself."""
    shutil.copytree(run, to)
    last, newest = to / "checkpoints" / "last.ckpt", to / "checkpoints" / "step=4.ckpt"
    assert os.path.samefile(run / "checkpoints" / last.name, run / "checkpoints" / newest.name)
    last.unlink()
    os.link(newest, last)
    return to


def damage(path: Path, draw: random.Random) -> None:
    """In place, so that every hard link shows it: some bytes, a block of 4 KB, or the end cut off."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        kind = draw.choice(KINDS)
        if kind == "end":
            file.truncate(draw.randrange(size))
            return
        for _ in range(draw.randint(1, 4) if kind == "bytes" else 1):
            start = draw.randrange(size if kind == "bytes" else size - 4096)
            file.seek(start)
            old = file.read(1 if kind == "bytes" else 4096)
            file.seek(start)
            file.write(bytes(b ^ draw.randrange(1, 256) for b in old))


@pytest.mark.parametrize(
    ("trials", "every"),
    [(60, 20), pytest.param(200, 1, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
    ids=["60", "200, each trained to its end"],
)
def test_each_damage_of_the_newest(
    place: Path, whole: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trials: int, every: int
) -> None:
    """Every so many trials, the run is resumed to its end."""
    fell_back = 0
    for trial in range(trials):
        folder = copy_run(stopped, tmp_path / f"{trial}")
        newest = folder / "checkpoints" / "last.ckpt"
        damage(newest, random.Random(trial))
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = checkpoint_to_resume(folder, "auto")
            assert found == checkpoint_to_resume(folder, "last")
        if found == newest:  # what was hit carries nothing, such as the padding between records
            same(read_state(folder), read_state(stopped))
        else:
            fell_back += 1
            assert found == folder / "checkpoints" / "step=2.ckpt"
            assert f"{newest} is " in caplog.text
            assert "damaged" in caplog.text
            assert f"Resuming from {found}, the newest whole checkpoint." in caplog.text
        if trial % every == 0:
            train(configure(place, [*RUN, "ckpt_path=auto"]), folder)
            assert read_metrics(folder) == read_metrics(whole)
            same(read_state(folder), read_state(whole))
        shutil.rmtree(folder)
    print(f"{fell_back} of {trials} damages were found, the others hit nothing that is read")
    assert fell_back > trials // 2


@pytest.mark.parametrize("ckpt_path", ["last", "auto"])
def test_damage_of_all_of_them(place: Path, stopped: Path, tmp_path: Path, ckpt_path: str) -> None:
    folder = copy_run(stopped, tmp_path / "run")
    before = (folder / "metrics.csv").read_bytes()
    for name in ("last", "step=2"):
        path = folder / "checkpoints" / f"{name}.ckpt"
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*last\.ckpt is .*step=2\.ckpt is ") as caught:
        train(configure(place, [*RUN, f"ckpt_path={ckpt_path}"]), folder)
    assert "\n" not in str(caught.value)
    assert (folder / "metrics.csv").read_bytes() == before


def test_a_file_that_was_asked_for_has_no_substitute(stopped: Path, tmp_path: Path) -> None:
    folder = copy_run(stopped, tmp_path / "run")
    path = folder / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"last\.ckpt is truncated, damaged"):
        checkpoint_to_resume(folder, path)
