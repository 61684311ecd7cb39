"""A run that is killed at any moment and resumed is, to the last bit, the run that was never killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nanochat.config.schema import CONF
from nanochat.run import train
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same, words

STEPS, ACCUMULATED = 7, 3
RUN = [
    f"trainer.max_steps={STEPS}", f"trainer.accumulate_grad_batches={ACCUMULATED}", "trainer.val_check_interval=3",
    "callbacks.checkpoint.every_n_train_steps=2", "~callbacks.loss_plot", "~callbacks.progress",
]  # fmt: skip
QUICK = [*RUN, "~callbacks.sampler"]
OPTIMIZERS = sorted(path.stem for path in (CONF / "optim").glob("*.yaml"))


class Crash(Exception):
    """Stands for whatever ends a run."""


def at_micro_step(number: int, action: Any) -> Any:
    """A training_step that acts in the middle of micro-step `number`, counted from 1 in this process."""
    original, count = NanoChatModule.training_step, 0

    def training_step(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = original(self, batch, batch_idx)
        if count == number:
            action()
        return loss

    return training_step


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def die_in_save() -> None:
    """Let the second save stop in the middle of its file."""
    original, count = torch.save, 0

    def save(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            file.write(b"half a checkpoint")
            file.flush()
            kill()
        original(content, file)

    torch.save = save


def die_in_validation() -> None:
    original, count = NanoChatModule.validation_step, 0

    def validation_step(self: NanoChatModule, batch: Any, batch_idx: int) -> None:
        nonlocal count
        count += 1
        original(self, batch, batch_idx)
        if count == 2:  # in the first validation, whose step is saved for its sake alone
            kill()

    NanoChatModule.validation_step = validation_step


def child(place: Path, folder: Path, death: str, micro_step: int) -> None:
    """A run that ends early, in a process of its own."""
    torch.set_num_threads(1)
    if death == "save":
        die_in_save()
    elif death == "validation":
        die_in_validation()
    else:
        number = getattr(signal, death)
        NanoChatModule.training_step = at_micro_step(micro_step, lambda: kill(number))
    train(configure(place, RUN), folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nothing stops."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(configure(place, RUN), place / "whole")
    torch.set_num_threads(threads)
    return place / "whole"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def equal_runs(one: Path, other: Path) -> None:
    rows = read_metrics(one)
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if row["val/bpb"]] == [3, 6, STEPS]
    assert rows == read_metrics(other)
    same(read_state(one), read_state(other))
    names = {path.name for path in (other / "checkpoints").iterdir()}
    assert {"last.ckpt", f"step={STEPS}.ckpt"} < names
    assert len(names) == 4  # of three steps, and nothing half-written


FEATURES = {
    "streams": [
        *("+mhc=on", "mhc.streams=4", "activation_checkpointing=feedforward"),
        *("model.weight_block=row", "model.int8=true", "model.int8_backward=true"),
    ],
    "dynamic-streams": ["+mhc=on", "mhc.maps=dynamic", "optim=muon8bit", "+mtp=on", "+collider=on"],
}


@pytest.mark.parametrize("optim", [*OPTIMIZERS, *FEATURES])
def test_each_optimizer(place: Path, optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every source of random numbers drawn from in each micro-step, and a crash in the middle of a step."""
    settings = [*QUICK, *FEATURES.get(optim, [f"optim={optim}"])]
    original = NanoChatModule.training_step

    def noisy(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return original(self, batch, batch_idx) * (1.0 + noise)

    monkeypatch.setattr(NanoChatModule, "training_step", noisy)
    train(configure(place, settings), place / f"{optim}-whole")
    folder = place / optim

    def crash() -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(NanoChatModule, "training_step", at_micro_step(6 * ACCUMULATED - 1, crash))
        with pytest.raises(Crash):
            train(configure(place, settings), folder)
    assert read_state(folder)["global_step"] == 4  # 5 was not saved, and later the step was no longer whole
    train(configure(place, [*settings, "ckpt_path=last"]), folder)
    equal_runs(place / f"{optim}-whole", folder)


MOMENT = random.Random(0).randrange(2 * ACCUMULATED + 1, STEPS * ACCUMULATED + 1)


@pytest.mark.parametrize(
    ("death", "micro_step", "code", "step"),
    [
        pytest.param("SIGKILL", MOMENT, -signal.SIGKILL, None, id="SIGKILL at a random micro-step"),
        ("validation", 0, -signal.SIGKILL, 3),
        ("save", 0, -signal.SIGKILL, 2),
        ("SIGTERM", 4 * ACCUMULATED + 2, 143, 5),
        ("SIGINT", 2 * ACCUMULATED + 2, 130, 3),
    ],
)
def test_each_death(place: Path, whole: Path, death: str, micro_step: int, code: int, step: int | None) -> None:
    folder = place / f"{death}-{micro_step}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat.run", "tests.test_resume"])
    process = context.Process(target=child, args=(place, folder, death, micro_step))
    process.start()
    process.join(60)
    assert process.exitcode == code
    for path in (folder / "checkpoints").glob("*.ckpt"):
        read_state(folder, path.stem)  # whole
    if step is not None:
        assert read_state(folder)["global_step"] == step
    if code > 0:
        assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    train(configure(place, [*RUN, "ckpt_path=auto"]), folder)
    equal_runs(whole, folder)
    assert (folder / "samples.md").read_text() == (whole / "samples.md").read_text()


def test_ctrl_c_and_resume_of_the_command(place: Path, whole: Path) -> None:
    """From outside, as a user does it: `nanochat train`, Ctrl-C, `nanochat train --resume`."""
    folder = place / "command"
    command = [sys.executable, "-m", "nanochat.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}
    cfg_words = [*words(place), *RUN, f"hydra.run.dir={folder}", "trainer.max_steps=100000"]
    process = subprocess.Popen([*command, *cfg_words], env=environment, cwd=place, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    step = read_state(folder)["global_step"]
    assert int(read_metrics(folder)[-1]["step"]) == step
    done = subprocess.run(
        [*command, "--resume", str(folder), f"trainer.max_steps={step + 1}"],
        env=environment, cwd=place, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [int(row["step"]) for row in read_metrics(folder) if row["train/loss"]] == list(range(1, step + 2))
    assert "val/bpb" in done.stdout
    assert f"--resume {folder}" in done.stdout or "--resume command" in done.stdout


def test_a_second_signal_leaves_at_once(place: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=impatient_child, args=(place, place / "impatient"))
    process.start()
    process.join(60)
    assert process.exitcode == 143
    assert not (place / "impatient" / "checkpoints").exists()


def impatient_child(place: Path, folder: Path) -> None:
    def twice() -> None:
        kill(signal.SIGINT)
        kill(signal.SIGTERM)
        time.sleep(60)

    NanoChatModule.training_step = at_micro_step(1, twice)
    train(configure(place, RUN), folder)


def test_an_extended_run_keeps_its_new_length(place: Path) -> None:
    folder = place / "extended"
    train(configure(place, [*RUN, "trainer.max_steps=2"]), folder)
    train(configure(place, [*RUN, "trainer.max_steps=4", "ckpt_path=last"]), folder)
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved.trainer.max_steps == 4
    assert saved.ckpt_path is None
    assert read_state(folder)["global_step"] == 4
