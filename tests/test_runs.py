"""nanochat runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat import cli, run_lock, runs
from nanochat.errors import UserError
from nanochat.run_folder import read_metrics

HEAD = "step,train/loss,train/tokens_per_second,val/loss,val/bpb"


def make(folder: Path, state: str, beat: float | None = 0.0, **summary: Any) -> Path:
    """A run's folder as each end leaves it; its last heartbeat was `beat` seconds ago."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("trainer:\n  max_steps: 900\n")
    (folder / "model.json").write_text("{}")
    (folder / "checkpoints/step=40.ckpt").write_bytes(bytes(5000))
    os.link(folder / "checkpoints/step=40.ckpt", folder / "checkpoints/last.ckpt")
    lines = [
        "step,train/loss,train/tokens_per_second,val/loss,val/bpb",
        "39,2.5,100,,",
        "40,1.5,300,,",
        "40,,,1.4,2.25",
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n41,1.")
    if state != "running":
        (folder / "summary.json").write_text(json.dumps({"status": state, "step": 40, **summary}))
    if beat is not None:
        content = {"step": 40, "max_steps": 200, "seconds_left": 60.0, "time": time.time() - beat, "process": 1}
        (folder / "heartbeat.json").write_text(json.dumps(content))
        if state != "running":
            os.utime(folder / "summary.json", (time.time() - beat + 1.0,) * 2)
    return folder


def test_each_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "outputs"
    for state in ("finished", "stopped", "failed"):
        make(outputs / state, state)
    make(outputs / "sweep" / "0", "running", beat=30.0)  # killed in its first session
    killed = make(outputs / "sweep" / "1", "stopped", beat=100.0)  # killed in its second one
    os.utime(killed / "summary.json", (time.time() - 500.0,) * 2)
    make(outputs / "old", "finished", beat=None)
    live, silent = make(outputs / "live", "running", beat=10.0), make(outputs / "silent", "running", beat=3000.0)
    (outputs / "latest").symlink_to("live")
    (outputs / "live/wandb").mkdir()
    (outputs / "notes").mkdir()
    with run_lock.hold(live), run_lock.hold(silent):
        assert cli.main(["runs", str(outputs), "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert cli.main(["runs", str(outputs)]) == 0
    found = {str(Path(run["run"]).absolute().resolve().relative_to(outputs.resolve())): run for run in listed}
    assert {name: run["state"] for name, run in found.items()} == {
        "finished": "finished", "stopped": "stopped", "failed": "failed", "sweep/0": "killed", "sweep/1": "killed",
        "old": "finished", "live": "running", "silent": "silent",
    }  # fmt: skip
    run = found["live"]
    assert (run["step"], run["max_steps"], run["loss"], run["val/bpb"]) == (40, 200, 2.0, 2.25)
    assert run["tokens_per_second"] == pytest.approx(150.0)  # of two steps of as many tokens
    assert 45.0 < run["seconds_left"] <= 50.0
    assert 5000 < run["bytes"] < 6000, "last.ckpt is another name of step=40.ckpt"
    assert found["finished"]["seconds_left"] is None
    assert found["old"]["max_steps"] == 900
    shown = capsys.readouterr().out
    assert "8 runs, 0.0 MB on disk." in shown
    assert "40 of 200" in shown


def test_a_clock_that_was_set_back_adds_no_time(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", "running", beat=-86400.0)
    with run_lock.hold(folder):
        found = runs.describe(folder)
    assert (found["state"], found["seconds_left"]) == ("running", 60.0)


def test_a_run_killed_between_two_heartbeats_has_come_as_far_as_its_rows(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", "running")
    beat = json.loads((folder / "heartbeat.json").read_text())
    for step, expected in ((0, 40), (45, 45)):
        (folder / "heartbeat.json").write_text(json.dumps({**beat, "step": step}))
        assert runs.describe(folder)["step"] == expected


def test_a_long_metrics_file_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "run", "finished")
    rows = [f"{step},{step / 1000},10,," for step in range(1, 3001)]
    rows[100] = "101,,,1.0,9.5"
    (folder / "metrics.csv").write_text("\n".join([HEAD, *rows, ""]))
    monkeypatch.setattr(runs, "TAIL", 2000)
    run = runs.describe(folder)
    assert run["loss"] == pytest.approx(2.9905)  # the mean of 2,981 to 3,000
    assert run["val/bpb"] == 9.5, "its only validation lies before what is read at first"


def test_damaged_files_do_not_hide_the_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "good", "finished")
    for name, content in (("bytes", b"\xff\xfe"), ("rows", b"step,train/loss,val/bpb\n1,abc,\n2,1.5,nan\n\xb2,2.5,\n")):
        make(tmp_path / name, "running", beat=None)
        (tmp_path / name / "metrics.csv").write_bytes(content)
    text = make(tmp_path / "text", "finished")
    summary = {"status": "finished", "step": "many", "val/bpb": []}
    (text / "summary.json").write_text(json.dumps(summary))
    beat = {"step": [], "max_steps": "all", "seconds_left": "soon", "time": 1.0}
    (text / "heartbeat.json").write_text(json.dumps(beat))
    (text / "metrics.csv").write_text("step,train/loss\n")
    with run_lock.hold(make(tmp_path / "live", "running", beat=None)):
        (tmp_path / "live" / "heartbeat.json").write_text(json.dumps({**beat, "time": time.time()}))
        assert cli.main(["runs", str(tmp_path), "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert cli.main(["runs", str(tmp_path)]) == 0
    found = {Path(run["run"]).name: (run["state"], run["step"], run["loss"], run["val/bpb"]) for run in listed}
    assert found == {
        "good": ("finished", 40, 2.0, 2.25), "bytes": ("unreadable", 0, None, None), "rows": ("killed", 2, 1.5, None),
        "text": ("finished", 0, None, None), "live": ("running", 40, 2.0, 2.25),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"metrics\.csv cannot be read: not a table of text"):
        read_metrics(tmp_path / "bytes" / "metrics.csv")


def test_watching_ends_with_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run", "finished")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs.time, "sleep", sleep)
    assert cli.main(["runs", str(tmp_path), "--watch", "--every", "0.5"]) == 0
    assert looks == [0.5, 0.5]
    assert capsys.readouterr().out.count("finished") == 2


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        runs.main([str(tmp_path / "none")])
    with pytest.raises(UserError, match="--json is one answer"):
        runs.main([str(tmp_path), "--json", "--watch"])
    with pytest.raises(UserError, match="--every"):
        runs.main([str(tmp_path), "--every", "0"])
    assert runs.main([str(tmp_path)]) == 0
    assert "No runs yet." in capsys.readouterr().out
