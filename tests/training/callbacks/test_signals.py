"""Signals of schedulers, and SLURM's queue."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nanochat.run import train
from nanochat.run_folder import read_summary
from nanochat.training.callbacks.signals import exit_code, requeue
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_state
from tests.training.callbacks.short_runs import BARE


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a fake scontrol writes its arguments."""
    said, program = tmp_path / "said", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\ntest "$2" != 13 || {{ echo "no such job" >&2; exit 1; }}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return said


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGTERM", 143)])
def test_a_slurm_job_is_saved_and_queued_again(
    place: Path, queue: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    step = NanoChatModule.training_step

    def training_step(module: NanoChatModule, *args: Any) -> Any:
        if module.global_step == 2:
            os.kill(os.getpid(), getattr(signal, name))
        return step(module, *args)

    folder = place / f"queued-{name}"
    settings = [*BARE, "ckpt_path=auto", "trainer.val_check_interval=100"]
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "7")
        patch.setattr(NanoChatModule, "training_step", training_step)
        with pytest.raises(SystemExit) as caught:
            train(configure(place, settings), folder)
    assert caught.value.code == code == exit_code(getattr(signal, name))
    assert read_state(folder)["global_step"] == 3
    assert read_summary(folder)["status"] == "stopped"
    assert queue.read_text() == "requeue 7\n"
    assert json.loads((folder / "heartbeat.json").read_text())["max_steps"] == 5
    train(configure(place, settings), folder)  # what the queue starts
    assert read_state(folder)["global_step"] == 5


def test_what_is_queued_again(queue: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    requeue("auto")  # not in a job
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    requeue(None)
    assert not queue.exists()
    assert "Job 7 is not queued again, since it would not resume: give hydra.run.dir and ckpt_path=auto." in caplog.text
    with caplog.at_level(logging.WARNING):
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        requeue("auto")
        assert "Job 13 could not be queued again: no such job" in caplog.text
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        requeue("last")
        assert queue.read_text() == "requeue 13\nrequeue 40_2\n"
        monkeypatch.setenv("PATH", "")
        requeue("last")
        assert "Job 40_2 could not be queued again: " in caplog.text
