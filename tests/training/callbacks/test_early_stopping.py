"""A run whose validation gets no better ends, also after a resume."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.run import train
from nanochat.training.callbacks.early_stopping import EarlyStopping
from tests.runs import configure, read_metrics, read_state, same

HOPELESS = [
    "callbacks=early_stopping", "callbacks.early_stopping.patience=2", "optim=adamw", "optim.lr=0",
    "optim.tied_lr=null",  # every rate is optim.lr
    "trainer.max_steps=40", "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=2",
    "callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.keep=null",
    "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stopping")


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    train(configure(place, HOPELESS), place / "run")
    return place / "run"


def test_a_run_that_cannot_learn_is_stopped(stopped: Path) -> None:
    """The validation after step 2 is the best, those after 4 and 6 are no better."""
    rows = read_metrics(stopped)
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "2", "3", "4", "5", "6"]
    assert len({row["val/bpb"] for row in rows if row["val/bpb"]}) == 1
    assert read_state(stopped)["global_step"] == 6
    summary = json.loads((stopped / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 6)
    assert summary["val/bpb"] == float(rows[-1]["val/bpb"])


def test_one_that_learns_is_not(place: Path) -> None:
    settings = [*HOPELESS, "optim.lr=0.003", "trainer.max_steps=10", "callbacks.early_stopping.patience=1"]
    train(configure(place, settings), place / "learns")
    assert read_state(place / "learns")["global_step"] == 10


@pytest.mark.parametrize("step", [3, 4, 5, 6])
def test_a_resumed_run_stops_where_it_would_have(place: Path, stopped: Path, step: int) -> None:
    """Also from a checkpoint before whose validation it was killed."""
    folder = place / f"from-{step}"
    settings = [*HOPELESS, f"ckpt_path='{stopped / 'checkpoints' / f'step={step}.ckpt'}'"]
    train(configure(place, settings), folder)
    if step < 6:
        same(read_state(folder), read_state(stopped))
    last = read_metrics(folder)[-1]
    assert (last["step"], last["val/bpb"]) == ("6", read_metrics(stopped)[-1]["val/bpb"])


def test_a_stopped_run_stops_again_unless_it_is_given_patience(
    place: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, state = read_metrics(stopped), read_state(stopped)
    with caplog.at_level(logging.INFO):
        train(configure(place, [*HOPELESS, "ckpt_path=last"]), stopped)
    assert "Stopping after step 6: val/bpb has not been lower" in caplog.text
    assert "of step 2 in 2 validations" in caplog.text
    assert read_metrics(stopped) == rows
    same(read_state(stopped), state)
    train(configure(place, [*HOPELESS, "ckpt_path=last", "callbacks.early_stopping.patience=4"]), stopped)
    assert read_state(stopped)["global_step"] == 10
    assert [row["step"] for row in read_metrics(stopped)][-1] == "10"


def validate(callback: EarlyStopping, step: int, value: float, fn: str = "fit") -> bool:
    """Whether the run is stopped after a validation."""
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=fn), sanity_checking=False, global_step=step, should_stop=False,
        callback_metrics={"val/bpb": value, "val/loss": -value},
    )  # fmt: skip
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    return trainer.should_stop


def test_what_is_better() -> None:
    callback = EarlyStopping(patience=2, min_delta=0.5)
    values = [3.0, 2.6, 2.4, math.nan, 1.4, 1.0, math.nan]
    assert [validate(callback, step, value) for step, value in enumerate(values)] == [False] * 6 + [True]
    callback = EarlyStopping(patience=1, monitor="val/loss")
    assert [validate(callback, step, value) for step, value in enumerate([1.0, 2.0, 1.5])] == [False, False, True]


def test_a_validation_counts_once_and_only_while_training() -> None:
    callback = EarlyStopping(patience=2)
    assert not validate(callback, 1, 1.0)
    assert not validate(callback, 2, 1.0)
    again = EarlyStopping(patience=2)
    again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert not validate(again, 2, 1.0)  # made up for by the resume
    assert not validate(again, 3, 1.0, fn="validate")
    assert validate(again, 3, 1.0)
    assert validate(again, 3, 1.0)
