"""Two commands in one run folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nanochat.cli
from nanochat import run_lock
from nanochat.config.schema import CONF
from tests.launching.conftest import Call
from tests.runs import read_metrics, read_state, words


def test_two_commands_in_one_folder(call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first is a process of its own, which is killed; the others are called here."""
    folder = tmp_path / "run"
    run = [
        *words(tmp_path), f"hydra.run.dir={folder}", "trainer.max_steps=100000", "~callbacks.sampler",
        "~callbacks.loss_plot", "callbacks.checkpoint.every_n_train_steps=2", "trainer.val_check_interval=50",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}
    command = [sys.executable, "-m", "nanochat.cli", "train", *run]
    first = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # it holds the folder, and leaves the machine to the others
        assert nanochat.cli.main(["generate", str(folder), "--prompt", "tree", "--max-tokens", "2"]) == 0
        assert caplog.text.count(f"{folder} is still running: this is step ") == 1
        assert " of 100000." in caplog.text
        sentence = f"is in use by process {first.pid} on {socket.gethostname()} since "
        for arguments, code in (
            (run, 2),
            ([*run, "ckpt_path=auto"], 75),
            (["--resume", str(folder)], 2),
        ):
            found, _, err = call(*arguments)
            assert (found, sentence in err, err.count("\n")) == (code, True, 1), err
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    step = read_state(folder)["global_step"]
    assert call("--resume", str(folder), f"trainer.max_steps={step + 1}")[0] == 0
    assert [int(row["step"]) for row in read_metrics(folder) if row["train/loss"]] == list(range(1, step + 2))
    assert not (folder / run_lock.NAME).exists()
