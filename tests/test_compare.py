"""Comparisons: pairs of seeds, what their differences show, and that no run is mistaken for another."""

import json
import logging
import math
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import nanochat.cli
from nanochat.errors import UserError
from nanochat.files import quoted
from nanochat.reports.table import Table
from nanochat.studies import cli, runner
from nanochat.studies.runner import merged
from nanochat.studies.statistics import STUDENT, Comparison, Result, difference, interval, verdict
from tests import runs


def results(values, seconds=1.0, folder=None, state=8):
    return [Result(folder, value, seconds, state) for value in values]


def test_students_quantiles_against_the_density():
    for n, quantile in enumerate(STUDENT, start=1):
        t = np.linspace(-quantile, quantile, 200_001)
        log_norm = math.lgamma((n + 1) / 2) - math.lgamma(n / 2) - 0.5 * math.log(n * math.pi)
        density = np.exp(log_norm) * (1 + t**2 / n) ** (-(n + 1) / 2)
        inside = ((density[1:] + density[:-1]) / 2).sum() * (t[1] - t[0])
        assert inside == pytest.approx(0.95, abs=1e-4), n


def test_interval_is_of_the_paired_differences():
    arm, plain = results([1.0, 2.0, 3.5]), results([1.5, 2.1, 3.0])
    gaps = np.array([-0.5, -0.1, 0.5])
    mean, half = interval(arm, plain)
    assert mean == pytest.approx(gaps.mean())
    assert half == pytest.approx(4.303 * gaps.std(ddof=1) / 3**0.5)
    assert difference(arm, plain) == f"{mean:+.4f} ± {half:.4f}"
    with pytest.raises(ValueError, match="zip"):
        interval(arm, plain[:2])


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([-0.5, -0.51, -0.49], "better"),
        ([0.5, 0.51, 0.49], "worse"),
        ([-0.5, 0.4, 0.0], "no difference shown"),
        ([0.5], "one seed: no verdict"),
    ],
)
def test_verdict(gaps, said):
    plain = results([3.0] * len(gaps))
    assert verdict(results([3.0 + gap for gap in gaps]), plain) == said


def test_an_arm_s_word_replaces_the_base_s():
    base = ["optim=adamw", "optim.lr=0.1", "+mtp=on", "~callbacks.sampler"]
    assert merged(base, ["optim=muon", "+mtp=off"]) == ["optim.lr=0.1", "~callbacks.sampler", "optim=muon", "+mtp=off"]


def test_pairs_steps_and_equal_time(monkeypatch, tmp_path):
    started = []

    def train(words, folder, steps, threads, watch):
        started.append((tuple(words), folder.name, steps))
        slow, seed = "+mtp=on" in words, int(words[-1].removeprefix("seed="))
        # the machine is ten times slower for the second seed, in both arms alike
        return Result(folder, 2.0 + seed + 0.25 * slow, (1.25 if slow else 1.0) * (10.0 if seed else 1.0), 8)

    monkeypatch.setattr(runner, "train", train)
    arms = {"plain": [], "a b/c": ["+mtp=on"]}
    found = runner.compare(["model=tiny"], arms, tmp_path, steps=100, seeds=2, jobs=1, timed=["a b/c"])
    assert [entry for entry in started if entry[2] == 100] == [
        (("model=tiny", "seed=0"), "steps-plain-0", 100),
        (("model=tiny", "+mtp=on", "seed=0"), "steps-a_b_c-0", 100),
        (("model=tiny", "seed=1"), "steps-plain-1", 100),
        (("model=tiny", "+mtp=on", "seed=1"), "steps-a_b_c-1", 100),
    ]
    assert [entry[1:] for entry in started if entry[2] != 100] == [("time-a_b_c-0", 80), ("time-a_b_c-1", 80)]
    assert found.step_ratio("a b/c") == 1.25
    steps, timed = found.tables()
    assert steps.headings == ["arm", "step / plain", "optimizer MB", "bits per byte", "difference", "verdict"]
    assert steps.rows[1] == ["a b/c", "1.250", "0.00", "2.7500", "+0.2500 ± 0.0000", "worse"]
    assert timed.title == "the same time"
    assert [row[:2] for row in timed.rows] == [["plain", "100"], ["a b/c", "80"]]
    assert found.markdown().count("| a b/c |") == 2
    assert found.figures()["arms"]["a b/c"]["timed_bpb"] == [2.25, 3.25]


def test_the_first_failure_ends_the_others(monkeypatch, tmp_path):
    begun, release = [], threading.Event()

    def train(words, folder, steps, threads, watch):
        begun.append(folder.name)
        if len(begun) == 1:
            raise UserError("the text is too short.")
        release.wait(5)
        raise AssertionError("a run was started after the failure")

    monkeypatch.setattr(runner, "train", train)
    with pytest.raises(UserError, match="too short"):
        runner.compare([], {"plain": [], "b": ["x=1"]}, tmp_path, steps=5, seeds=9, jobs=1)
    assert len(begun) <= 2  # the pool may have taken one more before it heard of it


def test_each_arm_gets_its_own_rate_before_it_is_judged(monkeypatch, tmp_path, capsys):
    """The judged runs have other seeds than the one that chose; a rate that diverges is not chosen."""
    judged = []

    def train(words, folder, steps, threads, watch):
        rate = float(next(word.removeprefix("optim.lr=") for word in words if word.startswith("optim.lr=")))
        best = 0.01 if "optim=adamw" in words else 0.1
        if "tuning" in folder.parts:
            assert words[-1] == "seed=1000"
            if rate > 0.5:
                folder.mkdir(parents=True)
                (folder / "summary.json").write_text('{"error": "DivergedError: NaN"}')
                raise RuntimeError
        else:
            judged.append((*words[-2:], folder.name))
        return Result(folder, 2.0 + abs(math.log(rate / best)), 1.0, 8)

    monkeypatch.setattr(runner, "train", train)
    words = ["compare", "optim=muon", "--arms", "optim=adamw", "--steps", "9", "--seeds", "2", "--jobs", "1"]
    words += ["--tune", "optim.lr=log(0.01,1,3)", "--out", str(tmp_path)]
    assert nanochat.cli.main(words) == 0
    assert sorted(judged) == [
        ("optim.lr=0.01", "seed=0", "steps-optim=adamw-0"),
        ("optim.lr=0.01", "seed=1", "steps-optim=adamw-1"),
        ("optim.lr=0.1", "seed=0", "steps-plain-0"),
        ("optim.lr=0.1", "seed=1", "steps-plain-1"),
    ]
    tuning = json.loads((tmp_path / "comparison.json").read_text())["tuning"]
    assert tuning["values"] == ["0.01", "0.1", "1"]
    assert tuning["chosen"] == {"plain": "0.1", "optim=adamw": "0.01"}
    assert tuning["bpb"]["plain"] == [pytest.approx(2 + math.log(10)), 2.0, None]
    out = capsys.readouterr().out
    assert "optim=adamw is best at the edge of the range (optim.lr=0.01)" in out
    assert "diverged" in out


def test_tuning_that_only_diverges(monkeypatch, tmp_path, capsys):
    def train(words, folder, steps, threads, watch):
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"error": "DivergedError: NaN"}')
        raise RuntimeError

    monkeypatch.setattr(runner, "train", train)
    words = ["compare", "--arms", "optim=adamw", "--steps", "9", "--tune", "optim.lr=1,2", "--out", str(tmp_path)]
    assert nanochat.cli.main(words) == 2
    assert "plain diverges with every optim.lr of 1, 2" in capsys.readouterr().err


ARM = "+mtp=on mtp.kind=parallel"


def train_here(words, folder, threads, watch):
    """As `runner._train`, without the time that a process takes to start; tests below have processes."""
    assert nanochat.cli.main(["train", *words, f"hydra.run.dir={quoted(folder)}"]) == 0


def test_the_folder_of_a_run_is_given_as_it_was_typed(monkeypatch):
    """So that the command is the same on any machine."""
    commands = []

    class Child:
        returncode = 0

        def __init__(self, command, **options):
            commands.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def communicate(self):
            return "", ""

    monkeypatch.setattr(runner.subprocess, "Popen", Child)
    runner._train(["seed=1"], Path("outputs/a b/steps-plain-1"), 1, set())
    assert [command[2:] for command in commands] == [
        ["nanochat.cli", "train", "seed=1", "hydra.run.dir='outputs/a b/steps-plain-1'"]
    ]


def test_real_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_train", train_here)
    out = tmp_path / "out"
    words = ["compare", *runs.words(tmp_path), "--arms", ARM, "--steps", "4", "--seeds", "2", "--out", str(out)]
    words += ["--jobs", "1"]
    assert nanochat.cli.main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.rpartition("\n{\n")[2].join(["{\n", ""]))
    assert set(figures["arms"]) == {"plain", ARM}
    for arm, entry in figures["arms"].items():
        for seed, bpb in enumerate(entry["bpb"]):
            folder = out / f"steps-{'plain' if arm == 'plain' else '+mtp=on_mtp.kind=parallel'}-{seed}"
            summary = json.loads((folder / "summary.json").read_text())
            assert summary["val/bpb"] == pytest.approx(bpb, rel=1e-6)
            assert summary["step"] == 4
            assert not (folder / "samples.md").exists()
    assert figures["arms"]["plain"]["optimizer_bytes"] < figures["arms"][ARM]["optimizer_bytes"]
    assert len(set(figures["arms"]["plain"]["bpb"])) == 2
    # the same command again trains nothing
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.csv")}
    assert nanochat.cli.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.csv")} == before
    assert len(before) == 4
    assert "bits per byte" in capsys.readouterr().out
    assert f"| {ARM} |" in (out / "comparison.md").read_text()
    assert nanochat.cli.main(["report", str(out)]) == 0
    assert f"{ARM} (" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert len(page) > 10_000
    assert str(tmp_path) not in page
    assert page.count("nanochat train ckpt_path=auto model.dim=64") == 4
    # another comparison does not take these runs for its own
    assert nanochat.cli.main([*words, "--steps", "5"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_run_s_mistake_is_the_comparison_s(tmp_path, capsys):
    plain = [*runs.words(tmp_path), "data.paths=[nowhere]"]
    words = ["compare", *plain, "--arms", "optim=adamw", "--seeds", "1", "--steps", "3", "--out", str(tmp_path)]
    assert nanochat.cli.main(words) == 2
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "comparison.md").exists()


def test_a_run_cut_short_is_no_result(tmp_path, capsys):
    words = ["compare", *runs.words(tmp_path), "trainer.max_time=0.001s", "--arms", "optim=adamw", "--seeds", "1"]
    assert nanochat.cli.main([*words, "--steps", "50", "--jobs", "1", "--out", str(tmp_path / "out")]) == 2
    assert "of 50 steps" in capsys.readouterr().err


def test_what_every_arm_is(monkeypatch):
    """The techniques that are compared when none is named, on Muon's default run and on AdamW's."""
    seen = []
    monkeypatch.setattr(cli, "compare", lambda *a: seen.append(a) or Comparison(a[3], {}))
    monkeypatch.setattr(Comparison, "tables", lambda self: iter([Table("", ["arm"], [])]))
    monkeypatch.setattr(Comparison, "markdown", lambda self: "")
    for base in ([], ["optim=adamw"]):
        assert cli.main([*base, "--steps", "50", "--out", "outputs"]) == 0
    muon, adamw = (list(call[1]) for call in seen)
    assert muon == ["plain", *cli.TECHNIQUES]
    assert adamw == ["plain", *cli.TECHNIQUES[1:]]
    assert [call[3] for call in seen] == [50, 50]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--arms optim=muon", "changes nothing of the plain run"),
        ("--arms +mpt=on", "did you mean 'mtp'"),
        ("--arms optim=adamw '+mpt=on optim=lion'", "--arms '+mpt=on optim=lion': +mpt=on"),
        ("--seeds 21", "21 must be at most 20"),
        ("--seeds 0", "0 must be a whole number"),
        ("seed=1", "seed=1 does not go with compare"),
        ("--arms 'optim=adamw seed=1'", "seed=1 does not go with compare"),
        ("--arms data.batch_size=4", "changes data, which pairs must share"),
        ("--arms optim=muon8bit trainer.accumulate_grad_batches=2", "changes trainer.accumulate_grad_batches"),
        ("callbacks=none", "it needs the callbacks metrics and throughput"),
        ("~callbacks.throughput", "it needs the callbacks metrics and throughput"),
        ("schedule.warmup_steps=90 --steps 3", "warmup_steps=90"),
        ("--arms ' '", "changes nothing"),
        ("--tune optim.lr", "give KEY=log(LOW,HIGH,N)"),
        ("--tune 'optim.lr=log(0.1,0.01,3)'", "LOW must be below HIGH"),
        ("--tune 'optim.lr=log(0,1,3)'", "above 0"),
        ("--tune 'optim.lr=log(1,2,x)'", "are not two numbers and a count"),
        ("--tune 'optim.lr=exp(1,2,3)'", "give KEY=log(LOW,HIGH,N)"),
        ("--tune optim.lrr=1,2 --arms +mtp=on", "did you mean 'optim.lr'"),
        ("--tune data.batch_size=1,2", "data.batch_size is what all runs share"),
        ("--tune optim.lr=1,2 --arms 'optim=adamw optim.lr=1'", "which --tune is to choose"),
    ],
)
def test_mistakes(words, said, capsys, tmp_path):
    out = tmp_path / "out"
    assert nanochat.cli.main(["compare", "experiment=tiny", *shlex.split(words), "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert logging.root.manager.disable == logging.NOTSET


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert nanochat.cli.main(["compare", "--steps", "9", "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_stopped_comparison_leaves_no_run_behind_and_goes_on(number, code, tmp_path):
    out = tmp_path / "out"
    words = ["compare", *runs.words(tmp_path), "--arms", "optim=adamw", "--seeds", "1", "--jobs", "1"]
    words += ["--steps", "3000", "--out", str(out)]
    command = [sys.executable, "-m", "nanochat.cli", *words]
    # tests that run in a shell's background ignore Ctrl-C, and so would their children
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=default) as process:
        table = out / "steps-plain-0" / "metrics.csv"
        wait_for(lambda: table.exists() and table.read_text().count("\n") > 3, process)
        process.send_signal(number)
        assert process.wait(60) == code, process.stderr.read()
        assert not [line for line in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in read(line)]
    summary = json.loads((out / "steps-plain-0" / "summary.json").read_text())
    assert summary["status"] != "finished"
    assert 0 < summary["step"] < 3000
    assert (out / "steps-plain-0" / "checkpoints" / "last.ckpt").exists()


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
