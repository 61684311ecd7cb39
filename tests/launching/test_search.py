"""`hydra/sweeper=optuna`, from the command line to its study; but for one search, training is a stand-in here."""

from __future__ import annotations

import csv
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState, create_trial

from nanochat import launch, run_lock
from nanochat.errors import UserError
from nanochat.reports import live
from nanochat.run_folder import read_summary
from nanochat.search import Pruning, Trial, open_study
from nanochat.studies.evidence import read_run
from nanochat.studies.optuna_sweeper import overrides, search_space
from tests import runs as tiny
from tests.launching.conftest import Call

SEARCH = ("-m", "hydra/sweeper=optuna", "hydra.sweep.dir=swept")


def test_a_search_goes_for_the_least_bits_per_byte(runs, call: Call, monkeypatch, tmp_path: Path) -> None:
    code, out, err = call(
        *SEARCH, "seed=range(0,10)", "optim.lr=tag(log,interval(0.003,0.1))", "hydra.sweeper.n_trials=4"
    )
    assert (code, err) == (0, "")
    assert len(runs) == 4
    assert len({cfg.optim.lr for cfg in runs}) == 4
    assert all(0.003 <= cfg.optim.lr <= 0.1 for cfg in runs)
    best = min(range(4), key=lambda i: runs[i].seed)
    assert f"The best of 4 trials is job {best}: seed={runs[best].seed} optim.lr=" in out
    # more trials go on from there, and none is made twice; the table on a terminal knows what each one varies
    table = live.LiveTable(tmp_path / "swept", [])
    monkeypatch.setattr(live, "_showing", [table])
    code, out, err = call("--resume", "swept", "hydra.sweeper.n_trials=5")
    assert (code, err) == (0, "")
    assert len(runs) == 5
    assert table.jobs == {i: f"seed={cfg.seed} optim.lr={cfg.optim.lr}" for i, cfg in enumerate(runs)}
    assert "The best of 5 trials" in out


def test_a_search_that_was_stopped_goes_on_with_its_trial(runs, call: Call, tmp_path: Path) -> None:
    words = (*SEARCH, "seed=1,15", "optim.lr=interval(0.01,0.1)", "hydra.sweeper.n_trials=12", "hydra.sweeper.seed=3")
    assert call(*words)[0] == 130
    count = len(runs)
    assert runs[-1].seed == 15
    assert call(*words)[0] == 130
    assert len(runs) == count + 1
    assert runs[-1].optim.lr == runs[-2].optim.lr
    assert sorted(path.name for path in (tmp_path / "swept").glob("[0-9]*")) == sorted(map(str, range(count)))


def test_a_search_s_mistakes(runs, call: Call, monkeypatch, tmp_path: Path) -> None:
    assert "and nothing is" in call(*SEARCH, "seed=1")[2]
    assert "hydra.sweeper.n_trials=0 must be" in call(*SEARCH, "seed=1,2", "hydra.sweeper.n_trials=0")[2]
    sys.modules["nanochat.run"].train = lambda given, folder: {}  # type: ignore[attr-defined]
    code, out, err = call(*SEARCH, "seed=1,2")
    assert (code, err) == (2, "")
    assert out.count("failed: a sweeper minimises val/bpb, and this run has none") == 1
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'nanochat[optuna]'" in call(*SEARCH[:2], "seed=1,2")[2]


def test_a_search_holds_its_folder(runs, call: Call, monkeypatch, tmp_path: Path) -> None:
    words = (*SEARCH, "seed=range(0,10)", "hydra.sweeper.n_trials=2")
    folder = tmp_path / "swept"
    with run_lock.hold(folder):
        for _ in range(2):
            code, _, err = call(*words)
            assert (code, err.count("\n")) == (2, 1)
            assert f"swept is in use by process {os.getpid()}" in err
            monkeypatch.setattr(launch.run_lock, "check_free", lambda folder, try_later=False: None)  # started just now
    assert runs == []
    train, holders = sys.modules["nanochat.run"].train, []

    def watched(given: Any, place: Path) -> dict[str, float]:
        holders.append(run_lock.holder(folder))
        return train(given, place)

    sys.modules["nanochat.run"].train = watched  # type: ignore[attr-defined]
    assert call(*words)[0] == 0
    assert [(found or {}).get("process") for found in holders] == [os.getpid()] * 2
    assert not (folder / "run.lock").exists()


def test_a_trial_that_someone_else_ended(runs, call: Call, tmp_path: Path) -> None:
    train = sys.modules["nanochat.run"].train

    def ended(given: Any, place: Path) -> dict[str, float]:
        if place.name == "0":
            open_study(place.parent, 0).tell(0, state=TrialState.FAIL)
        return train(given, place)

    sys.modules["nanochat.run"].train = ended  # type: ignore[attr-defined]
    code, out, err = call(*SEARCH, "seed=range(0,10)", "hydra.sweeper.n_trials=2")
    assert (code, err) == (0, "")
    assert "The best of 1 trials is job 1" in out


@pytest.mark.parametrize("damage", ["text", "folder"])
def test_a_study_that_cannot_be_used(runs, call: Call, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "swept" / "study.db"
    path.parent.mkdir()
    path.mkdir() if damage == "folder" else path.write_text("no database, but long enough to be looked at " * 99)
    code, _, err = call(*SEARCH, "seed=1,2")
    said = "unable to open database file" if damage == "folder" else "file is not a database"
    assert (code, err) == (2, f"error: {path} cannot be used as a search's study: {said}.\n")
    assert runs == []


def test_a_search_shows_what_it_varies(runs, call: Call, tmp_path: Path) -> None:
    code, out, err = call(*SEARCH, "seed=1,2", "~callbacks.sampler", "task_name='a b'", "hydra.sweeper.n_trials=1")
    assert (code, err) == (0, "")
    assert "Launching" not in out
    assert f"Job 0: seed={runs[0].seed}\n" in out
    with open(tmp_path / "swept" / "sweep.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["overrides"] == f"~callbacks.sampler task_name='a b' seed={runs[0].seed}"


# ---- ranges ---------------------------------------------------------------------------------------------------------


def test_a_range_is_a_set_of_numbers_in_their_order() -> None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    words = [
        "a=range(1,10,4)",
        "b=range(0.1,0.5,0.1)",
        "c=range(8,0,-2)",
        "d=tag(log,range(1,65))",
        "e=1,2",
    ]
    assert search_space(words)[1] == {
        "a": IntDistribution(1, 9, step=4),
        "b": FloatDistribution(0.1, 0.4, step=0.1),
        "c": IntDistribution(2, 8, step=2),
        "d": IntDistribution(1, 64, log=True),
        "e": CategoricalDistribution(["1", "2"]),
    }
    for word in ("a=range(1,1)", "a=tag(log,range(0.1,0.5,0.1))", "a=tag(log,range(1,9,2))"):
        with pytest.raises(UserError, match=re.escape(word)):
            search_space([word])


def test_a_number_of_a_range_is_written_as_the_range_is(tmp_path: Path) -> None:
    study, space = open_study(tmp_path, 0), search_space(["a=range(0.1,1,0.1)", "b=range(0,9,3)", "c=interval(0,1)"])[1]
    for _ in range(8):
        number = study.ask(space).number
        words = overrides(trial := study.trials[number], space)
        assert words[0] in [f"a=0.{i}" for i in range(1, 10)]
        assert words[1] in ("b=0", "b=3", "b=6")
        assert words[2] == f"c={trial.params['c']!r}"


# ---- pruning --------------------------------------------------------------------------------------------------------


def add_trial(folder: Path, *values: float) -> None:
    """A finished trial, as if an earlier start had trained it."""
    open_study(folder, 0).add_trial(create_trial(value=values[-1], intermediate_values=dict(enumerate(values, 1))))


def test_what_is_pruned_is_not_ranked_and_not_made_again(runs, call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "swept"
    folder.mkdir()
    for _ in range(2):
        add_trial(folder, 4.0, 0.5)
    words = (
        *SEARCH,
        "seed=range(0,7)",
        "hydra.sweeper.n_trials=8",
        "hydra.sweeper.seed=4",
        "hydra.sweeper.pruner=median",
    )
    code, out, err = call(*words)
    assert (code, err) == (0, "")
    with open(folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pruned = [row for row in rows if row["status"] == "pruned"]
    assert 0 < len(pruned) < 6
    assert rows[-len(pruned) :] == pruned
    assert f"{len(pruned)} pruned: ended early" in out
    assert f"({len(pruned)} more were pruned)" in out
    assert min(float(row["val/bpb"]) for row in pruned) > 4
    assert call("--resume", "swept")[0] == 0
    assert len(runs) == 6
    code, out, _ = call("--resume", "swept", "hydra.sweeper.n_trials=9")
    assert len(runs) == 7
    assert "The sweep's 7 jobs" in out  # those of the earlier starts, too


def test_a_pruned_trial_whose_search_was_killed_is_not_trained_again(runs, call: Call, tmp_path: Path) -> None:
    """The job's summary says what the study had not been told."""
    words = (*SEARCH, "seed=1,2", "hydra.sweeper.n_trials=1", "hydra.sweeper.pruner=median")
    assert call(*words)[0] == 0
    study = open_study(tmp_path / "swept", 0)
    study.ask(search_space(["seed=1,2"])[1])
    (tmp_path / "swept" / "1").mkdir()
    (tmp_path / "swept" / "1" / "summary.json").write_text('{"status": "pruned", "val/bpb": 2.0}')
    code, out, _ = call("--resume", "swept")
    assert (code, len(runs)) == (0, 1)
    assert "1 is pruned already" in out
    assert [trial.state for trial in open_study(tmp_path / "swept", 0).trials] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pruner=media", "hydra.sweeper.pruner=media must be median, hyperband or null."),
        ("prune_after_trials=-1", "hydra.sweeper.prune_after_trials=-1 must be a whole number of at least 0."),
        ("prune_after_trials=true", "hydra.sweeper.prune_after_trials=True must be a whole number of at least 0."),
        ("prune_after_validations=0", "hydra.sweeper.prune_after_validations=0 must be a whole number of at least 1."),
    ],
)
def test_mistakes_of_pruning(runs, call: Call, tmp_path: Path, word: str, said: str) -> None:
    code, _, err = call(*SEARCH, "seed=1,2", f"hydra.sweeper.{word}")
    assert (code, err) == (2, f"error: {said}\n")
    assert not (tmp_path / "swept").exists()


def test_the_median_waits_for_trials_and_validations(tmp_path: Path) -> None:
    add_trial(tmp_path, 1.0, 1.0, 1.0)
    number = open_study(tmp_path, 0).ask().number

    def asked(after_trials: int, after_validations: int, validation: int) -> bool:
        return Trial(tmp_path, number, Pruning("median", after_trials, after_validations)).report(validation, 2.0)

    assert not asked(2, 1, 1)
    assert asked(1, 1, 1)
    assert [asked(1, 3, validation) for validation in (1, 2, 3)] == [False, False, True]
    assert open_study(tmp_path, 0).trials[number].intermediate_values == {1: 2.0, 2: 2.0, 3: 2.0}


def test_hyperband_gives_up_the_worse_ones(tmp_path: Path) -> None:
    study, ended = open_study(tmp_path, 0), []
    for number in range(6):  # each worse than those before it
        study.ask()
        trial = Trial(tmp_path, number, Pruning("hyperband"))
        given_up = next((v for v in range(1, 5) if trial.report(v, float(number))), None)
        study.tell(number, float(number)) if given_up is None else study.tell(number, state=TrialState.PRUNED)
        ended.append(given_up)
    assert ended[0] is None
    assert 2 <= sum(end is not None for end in ended) < 6


def test_a_trial_that_cannot_be_reported(tmp_path: Path) -> None:
    add_trial(tmp_path, 1.0)
    trial = Trial(tmp_path, 0, Pruning("median"))
    with pytest.raises(UserError, match="cannot be used as a search's study"):
        trial.report(1, 1.0)  # it has ended
    with pytest.raises(UserError, match="cannot be used as a search's study"):
        Trial(tmp_path, 7, Pruning("median")).report(1, 1.0)


def test_a_pruned_run_ends_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A real one: its checkpoint resumes, its summary and the report say what it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "swept").mkdir()
    add_trial(tmp_path / "swept", *[0.01] * 3)
    words = [*tiny.words(tmp_path), "trainer.max_steps=6", "trainer.val_check_interval=2", "~callbacks.loss_plot"]
    options = ["hydra.sweeper.n_trials=2", "hydra.sweeper.pruner=median", "hydra.sweeper.prune_after_trials=1"]
    assert launch.main([*SEARCH, *words, *options, "optim.lr=interval(0.01,0.02)"]) == 0
    folder = tmp_path / "swept" / "1"
    summary = read_summary(folder)
    assert (summary["status"], summary["step"]) == ("pruned", 2)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    trial = open_study(tmp_path / "swept", 0).trials[1]
    assert (trial.state, trial.value) == (TrialState.PRUNED, summary["val/bpb"])
    assert read_run(folder).problem == "pruned by its search at step 2"
    assert "Pruned after step 2" in capsys.readouterr().out
    assert launch.main(["--resume", str(folder)]) == 0  # by itself it is an ordinary run
    after = read_summary(folder)
    assert (after["status"], after["step"]) == ("finished", 6)
    assert (after["overrides"], after["command"]) == (summary["overrides"], summary["command"])
    assert after["command"].startswith("nanochat train -m model.dim=64 ")
    assert " hydra/sweeper=optuna hydra.sweep.dir=swept " in after["command"]
    assert after["resumed_by"] == "nanochat train --resume swept/1"
