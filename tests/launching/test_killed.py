"""Real sweeps whose whole process group is killed (SIGKILL) while they train, and one whose jobs are submitit's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from nanochat import launch
from nanochat.run_folder import read_summary
from nanochat.search import open_study
from tests import runs
from tests.launching.test_sweep import FAST, ROOT

pytestmark = pytest.mark.slow


def kill(words: list[str], when: Callable[[], bool]) -> None:
    """Start a sweep in a process group of its own, and kill all of it at some time."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nanochat.cli", "train", "-m", *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 300
    while not when():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("[0-9]*") if read_summary(path).get("status") == "finished"}


def written(folder: Path, job: str) -> int:
    return (folder / job / "metrics.csv").stat().st_mtime_ns


def steps(folder: Path, job: str) -> list[int]:
    return [int(row["step"]) for row in runs.read_metrics(folder / job) if row["train/loss"]]


def test_parallel_jobs_that_were_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "swept"
    # two short jobs, then two that are killed
    words = [*runs.words(tmp_path), *FAST, "trainer.max_steps=6,120", "seed=1,2", "hydra.sweep.dir=swept"]
    words += ["callbacks.checkpoint.every_n_train_steps=5", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    kill(words, (folder / "2" / "checkpoints" / "last.ckpt").exists)
    before = {job: written(folder, job) for job in finished(folder)}
    assert {"0", "1"} <= before.keys() < {"0", "1", "2", "3"}
    assert launch.main(["--resume", "swept", "hydra/launcher=basic"]) == 0
    assert finished(folder) == {"0", "1", "2", "3"}
    assert {job: written(folder, job) for job in before} == before
    assert steps(folder, "2") == steps(folder, "3") == list(range(1, 121))
    assert (folder / "sweep.csv").read_text().count("\n") == 5


def test_a_search_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished or pruned counts and is not trained again; what was training goes on with its values."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "swept"
    folder.mkdir()
    study = open_study(folder, 0)
    study.add_trial(create_trial(value=100.0, intermediate_values=dict.fromkeys(range(1, 9), 100.0)))
    study.add_trial(create_trial(state=TrialState.PRUNED, intermediate_values={1: 200.0}))
    words = [*runs.words(tmp_path), *FAST, "optim.lr=interval(0.01,0.02)", "trainer.max_steps=40"]
    words += ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.pruner=median"]
    words += ["hydra.sweeper.prune_after_trials=1", "callbacks.checkpoint.every_n_train_steps=5"]
    kill([*words, "hydra.sweep.dir=swept"], (folder / "3" / "checkpoints" / "step=15.ckpt").exists)
    assert finished(folder) == {"2"}
    before, given = written(folder, "2"), open_study(folder, 0).trials[3].params
    assert launch.main(["--resume", "swept"]) == 0
    trials = open_study(folder, 0).trials
    done, pruned = TrialState.COMPLETE, TrialState.PRUNED
    assert [trial.state for trial in trials] == [done, pruned, done, done, done]
    assert finished(folder) == {"2", "3", "4"}
    assert written(folder, "2") == before
    assert trials[3].params == given
    assert steps(folder, "3") == steps(folder, "4") == list(range(1, 41))
    assert trials[3].value == read_summary(folder / "3")["val/bpb"]


def test_jobs_of_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its executor for this machine, which starts the processes that SLURM would start."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'nanochat[slurm]'")
    monkeypatch.chdir(tmp_path)
    words = [*runs.words(tmp_path), *FAST, "trainer.max_steps=4", "seed=1,2", "hydra.sweep.dir=swept"]
    assert launch.main(["-m", *words, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=9"]) == 0
    folder = tmp_path / "swept"
    assert finished(folder) == {"0", "1"}
    assert (folder / "sweep.csv").read_text().count("\n") == 3
    before = [written(folder, job) for job in "01"]
    assert launch.main(["--resume", "swept", "hydra/launcher=basic"]) == 0
    assert [written(folder, job) for job in "01"] == before
    said = [read_summary(folder / job)["command"] for job in "01"]
    assert said[0] == said[1]
    assert said[0].startswith("nanochat train -m model.dim=64 ")
    assert said[0].endswith(" hydra.sweep.dir=swept hydra/launcher=submitit_local hydra.launcher.timeout_min=9")
