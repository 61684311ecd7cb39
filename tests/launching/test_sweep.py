"""Real sweeps: one is killed and resumed, one has its jobs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import launch
from tests import runs

ROOT = Path(__file__).resolve().parents[2]
FAST = ["schedule.warmup_steps=2", "trainer.val_check_interval=20", "~callbacks.sampler", "~callbacks.loss_plot"]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "nanochat.cli", "train", *words], env=env, stdout=subprocess.DEVNULL)


def test_a_killed_sweep_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job is not trained again; the second comes to what a run that was never stopped comes to."""
    monkeypatch.chdir(tmp_path)
    words = [*runs.words(tmp_path), *FAST, "trainer.max_steps=40"]
    folder = tmp_path / "swept"
    process = start(["-m", *words, "optim=adamw,muon", f"hydra.sweep.dir={folder}"])
    checkpoint, end = folder / "1" / "checkpoints" / "step=20.ckpt", time.monotonic() + 200
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "1" / "summary.json").exists()
    before = (folder / "0" / "metrics.csv").stat().st_mtime_ns
    assert launch.main(["--resume", str(folder)]) == 0
    assert (folder / "0" / "metrics.csv").stat().st_mtime_ns == before
    assert launch.main([*words, "optim=muon", "hydra.run.dir=whole"]) == 0
    assert runs.read_metrics(folder / "1") == runs.read_metrics(tmp_path / "whole")
    runs.same(runs.read_state(folder / "1"), runs.read_state(tmp_path / "whole"))
    assert (folder / "sweep.csv").read_text().count("\n") == 3


def test_jobs_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the machine's threads, are all in the table, and are not trained twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = [*runs.words(tmp_path), *FAST, "trainer.max_steps=4", "optim=muon,mun", "+mtp=off"]
    assert launch.main(["-m", *words]) == 2  # before any process is started
    words[-2] = "seed=1,2"
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=swept"]
    assert launch.main(["-m", *words, *launcher]) == 0
    folder = tmp_path / "swept"
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("0", "1")]
    threads = max(1, (os.cpu_count() or 1) // 2)
    assert all(f", {threads} thread" in summary["machine"] for summary in summaries)
    assert (folder / "sweep.csv").read_text().count("\n") == 3
    before = [(folder / name / "metrics.csv").stat().st_mtime_ns for name in ("0", "1")]
    assert launch.main(["--resume", str(folder), "hydra/launcher=basic"]) == 0
    assert [(folder / name / "metrics.csv").stat().st_mtime_ns for name in ("0", "1")] == before
