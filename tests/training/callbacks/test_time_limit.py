"""trainer.max_time, and schedules that end with it."""

from __future__ import annotations

import csv
import logging
import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.console import duration
from nanochat.errors import ConfigError, UserError
from nanochat.optim import WSD
from nanochat.run import train
from nanochat.training.callbacks import time_limit
from nanochat.training.callbacks.time_limit import Journal
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same
from tests.training.callbacks.short_runs import BARE

STEP, VALIDATION, BUDGET = 0.25, 1.5, 25.0
TIMED = [
    *BARE, "schedule.horizon=time", f"trainer.max_time={BUDGET}s", "trainer.max_steps=-1",
    "trainer.val_check_interval=30", "callbacks.checkpoint.every_n_train_steps=20", "callbacks.checkpoint.keep=null",
    "schedule.warmup_steps=5",
]  # fmt: skip


class Clock:
    """A clock that only training and validation advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step, self.validation = 1000.0, STEP, VALIDATION
        training_step, begin = NanoChatModule.training_step, NanoChatModule.on_validation_epoch_start

        def train_one(module: NanoChatModule, *args: Any) -> Any:
            self.now += self.step
            return training_step(module, *args)

        def validate(module: NanoChatModule) -> None:
            self.now += self.validation
            begin(module)

        monkeypatch.setattr(NanoChatModule, "training_step", train_one)
        monkeypatch.setattr(NanoChatModule, "on_validation_epoch_start", validate)
        monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def clock_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "clock.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def training_rows(folder: Path) -> list[dict[str, str]]:
    return [row for row in read_metrics(folder) if row["train/loss"]]


def test_time_limit_ends_at_a_step_and_saves(place: Path) -> None:
    folder = place / "timed"
    settings = ["trainer.max_steps=100000", "trainer.max_time=00:00:00:01", "trainer.accumulate_grad_batches=3"]
    metrics = train(configure(place, [*BARE, *settings, "trainer.val_check_interval=100000"]), folder)
    state, rows = read_state(folder), read_metrics(folder)
    assert 0 < state["global_step"] < 100_000
    assert state["DataModule"]["consumed"] == 3 * state["global_step"]
    assert int(rows[-1]["step"]) == state["global_step"]
    assert float(rows[-1]["val/loss"]) == metrics["val/loss"]


def test_the_schedule_ends_when_the_time_does(place: Path, clock: Clock) -> None:
    folder = place / "whole_time"
    start = clock.now
    train(configure(place, TIMED), folder)
    assert 0.99 * BUDGET <= clock.now - start <= BUDGET

    rows, begun = training_rows(folder), clock_rows(folder)
    assert [int(row["step"]) for row in begun] == list(range(len(rows)))
    assert [float(row["progress"]) for row in begun] == [float(row["train/progress"]) for row in rows]
    room = BUDGET - VALIDATION
    for step, (row, clock_row) in enumerate(zip(rows, begun, strict=True)):
        elapsed = STEP * step + VALIDATION * (step // 30)
        assert float(clock_row["elapsed"]) == pytest.approx(elapsed)
        if step > 30:  # once a validation has been measured
            assert float(clock_row["progress"]) == pytest.approx(elapsed / room)
        progress = float(clock_row["progress"])
        factor = min(1.0, (step + 1) / 5) * min(1.0, 0.05 + 0.95 * (1.0 - progress) / 0.4)
        assert float(row["train/lr"]) == pytest.approx(0.02 * factor, rel=1e-9)
    assert float(begun[-1]["progress"]) >= 1.0 - 2.0 * STEP / room


def test_a_resume_repeats_the_progress_of_steps_that_were_done(
    place: Path, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed at step 57, after the checkpoint of step 40; the second attempt is on a machine of half the speed."""
    whole, killed, start = tmp_path / "whole", tmp_path / "killed", clock.now
    train(configure(place, TIMED), whole)
    used = clock.now - start
    shutil.copytree(whole, killed)
    for path in (killed / "checkpoints").iterdir():
        if path.name not in ("step=20.ckpt", "step=40.ckpt"):
            path.unlink()
    lines = (killed / "clock.csv").read_text().splitlines(keepends=True)
    (killed / "clock.csv").write_text("".join(lines[: 1 + 57]) + lines[58][:9])  # its last line is cut off

    clock.step, start = 2.0 * STEP, clock.now
    train(configure(place, [*TIMED, f"ckpt_path='{killed}/checkpoints/step=40.ckpt'"]), killed)
    first, second = training_rows(whole), training_rows(killed)
    assert first[:57] == second[:57]
    assert first[57]["train/progress"] != second[57]["train/progress"]
    # what was lost does not count, and the end is the budget's
    begun = clock_rows(killed)
    assert float(begun[57]["elapsed"]) == pytest.approx(float(begun[56]["elapsed"]) + 2.0 * STEP)
    assert read_state(killed)["global_step"] < read_state(whole)["global_step"]
    elapsed = read_elapsed(killed)
    assert 0.98 * BUDGET <= elapsed <= BUDGET  # a step is 2% of it
    assert used == pytest.approx(read_elapsed(whole), abs=1e-3)

    # a finished run has nothing left to do
    state = read_state(killed)
    train(configure(place, [*TIMED, "ckpt_path=last"]), killed)
    same(state, read_state(killed))
    assert training_rows(killed) == second

    # a longer one goes on
    longer = ["trainer.max_time=40s" if word.startswith("trainer.max_time") else word for word in TIMED]
    with caplog.at_level(logging.WARNING):
        train(configure(place, [*longer, "ckpt_path=last"]), killed)
    assert "trainer.max_time 25.0s -> 40s" in caplog.text
    assert 0.98 * 40.0 <= read_elapsed(killed) <= 40.0
    assert training_rows(killed)[: len(second)] == second


def read_elapsed(folder: Path) -> float:
    from nanochat.run_folder import read_summary

    return read_summary(folder)["trained_seconds"]


def test_max_steps_bounds_a_timed_run_and_its_schedule(place: Path, clock: Clock, tmp_path: Path) -> None:
    settings = [*TIMED, "trainer.max_steps=50", "~callbacks.checkpoint", "trainer.max_time=1h"]
    train(configure(place, settings), tmp_path / "bounded")
    plain = [word for word in settings if not word.startswith(("schedule.horizon", "trainer.max_time"))]
    train(configure(place, plain), tmp_path / "plain")
    timed, by_steps = training_rows(tmp_path / "bounded"), training_rows(tmp_path / "plain")
    assert len(timed) == 50
    for a, b in zip(timed, by_steps, strict=True):
        assert float(a["train/lr"]) == pytest.approx(float(b["train/lr"]), rel=1e-9)


def test_an_attempt_after_a_divergence_does_not_get_its_time_back(tmp_path: Path, clock: Clock) -> None:
    limit = time_limit.TimeLimit("60s", "time")
    trainer: Any = SimpleNamespace(
        default_root_dir=tmp_path, global_step=0, max_steps=-1, is_global_zero=True, world_size=1,
        enable_validation=False, should_stop=False, accumulate_grad_batches=1, val_check_batch=None, callbacks=[],
    )  # fmt: skip
    module: Any = SimpleNamespace(step_metrics={})

    def steps(first: int, last: int) -> None:
        limit.on_train_start(trainer, module)
        for step in range(first, last):
            trainer.global_step = step
            limit.on_train_batch_start(trainer, module, None, 0)
            clock.now += 1.0
            trainer.global_step = step + 1
            limit.on_step_end(trainer, module, step + 1)

    steps(0, 10)
    saved = {"elapsed": 4.0, "progress": 4.0 / 60.0}
    trainer.global_step = 4
    limit.load_state_dict(saved)
    steps(4, 6)
    assert limit.elapsed() == 12.0
    assert [float(row["elapsed"]) for row in clock_rows(tmp_path)] == [0, 1, 2, 3, 10, 11]
    assert module.max_steps == pytest.approx(5 / (11 / 60))


def test_a_slow_first_step_does_not_cut_the_warm_up_short() -> None:
    schedule = WSD(warmup_steps=100, horizon="time")
    assert schedule(0, float("inf")) == pytest.approx(0.01)
    assert schedule(1, 1 / 0.005) == pytest.approx(0.02)  # one step has taken 0.5% of the time
    assert schedule(9, 9 / 0.1) == 1.0  # steps of which a tenth of the time holds nine
    rising = [schedule.rising(step, step / (step / 500)) for step in range(1, 200)]
    assert rising == sorted(rising)
    assert rising[49] == 1.0


LENGTHS = {"8h": 28800, "90m": 5400, "1h30m": 5400, "1.5h": 5400, "1d 2h": 93600, "45s": 45, "01:08:00:01": 115201}


def test_lengths_of_time() -> None:
    assert {text: duration(text) for text in LENGTHS} == LENGTHS
    assert duration({"hours": 2, "minutes": 1}) == 7260
    assert duration(timedelta(minutes=3)) == 180


NO_LENGTHS = ["soon", "8", 8, "", "0s", "-1h", "1.2.3h", "8h30", {"weaks": 1}, "00:00:00:00", None]


@pytest.mark.parametrize("given", NO_LENGTHS)
def test_what_is_no_length_of_time(given: Any) -> None:
    with pytest.raises(UserError, match="must be a length of time above 0, such as 8h"):
        duration(given)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["schedule.horizon=time"], "schedule.horizon=time needs the time: trainer.max_time=8h"),
        (["schedule.horizon=clock"], "schedule.horizon='clock' must be steps or time"),
        (["trainer.max_steps=-1"], "trainer.max_steps=-1 must be a whole number of at least 1"),
        (["schedule.horizon=time", "trainer.max_time=1h", "trainer.max_steps=0"], "trainer.max_steps=0 must be"),
    ],
)
def test_mistakes(place: Path, tmp_path: Path, settings: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        train(configure(place, settings), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_damaged_journal_does_not_keep_a_run_from_resuming(tmp_path: Path) -> None:
    lines = [b"1,1.0,0.1,60.0", b"\xff\xfe", b"2,nan,0.2,60.0", b"3,3.0,1.5,60.0", b"4,inf,0.4,60.0", b"5,5.0,0.5,60.0"]
    (tmp_path / "clock.csv").write_bytes(b"\n".join([b"step,\xff", *lines, b""]))
    journal = Journal(tmp_path, 1)
    assert [journal.recorded(step, 60.0) for step in range(1, 6)] == [(1.0, 0.1), None, None, None, (5.0, 0.5)]
    assert (tmp_path / "clock.csv").read_text() == f"{Journal.HEAD}{lines[0].decode()}\n{lines[-1].decode()}\n"
    (tmp_path / "clock.csv").unlink()
    (tmp_path / "clock.csv").mkdir()
    with pytest.raises(UserError, match=r"clock\.csv cannot be read: Is a directory"):
        Journal(tmp_path, 1)
