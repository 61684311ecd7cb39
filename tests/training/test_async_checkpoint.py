"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat.checkpoint import load_run, read_checkpoint
from nanochat.errors import UserError
from nanochat.run import train
from nanochat.run_folder import find_checkpoint, read_summary
from nanochat.runs import describe
from nanochat.training import checkpoint_io
from nanochat.training.callbacks import checkpoint as callback_module
from nanochat.training.callbacks.checkpoint import Checkpoint, _repeat
from nanochat.training.checkpoint_io import Writer, snapshot
from nanochat.training.module import NanoChatModule
from nanochat.training.resume import newest_whole
from nanochat.validate import Validation
from tests.runs import configure, read_metrics, read_state, same
from tests.training.callbacks.short_runs import BARE

ASYNC = [*BARE, "callbacks.checkpoint.asynchronous=true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("async")


def test_a_snapshot_shares_nothing_with_the_run_and_as_much_with_itself(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    content = {
        "state_dict": {"embedding": table, "head": table, "transposed": table.T, "row": table[1]},
        "states": [(torch.ones(2, dtype=torch.int8), 3), {"name": "x"}],
        "none": None,
    }
    copied = snapshot(content)
    same(content, copied)
    assert copied["state_dict"]["head"].data_ptr() == copied["state_dict"]["embedding"].data_ptr()
    for name, value in (("one", content), ("other", copied)):
        (tmp_path / name).mkdir()
        torch.save(value, tmp_path / name / "file")
    assert (tmp_path / "one/file").stat().st_size == (tmp_path / "other/file").stat().st_size
    table.zero_()
    content["states"][1]["name"] = "y"
    assert copied["state_dict"]["head"].tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert copied["states"][1]["name"] == "x"


def test_the_files_are_those_of_the_step_they_are_named_after(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disk so slow that training is two steps further when a file is whole."""
    train(configure(place, BARE), place / "sync")
    write, trained = checkpoint_io.write, []
    step = NanoChatModule.optimizer_step

    def slow(checkpoint: dict[str, Any], path: Path) -> None:
        before = len(trained)
        deadline = time.monotonic() + 20.0
        while len(trained) < min(before + 1, 5) and time.monotonic() < deadline:
            time.sleep(0.01)
        write(checkpoint, path)

    def optimizer_step(module: NanoChatModule, *args: Any, **kwargs: Any) -> None:
        step(module, *args, **kwargs)
        trained.append(module.global_step)

    monkeypatch.setattr(checkpoint_io, "write", slow)
    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    train(configure(place, ASYNC), place / "async")
    names = {path.name for path in (place / "sync/checkpoints").iterdir()}
    assert names == {path.name for path in (place / "async/checkpoints").iterdir()} > {"step=2.ckpt", "step=4.ckpt"}
    for name in names:
        same(read_state(place / "sync", name[:-5]), read_state(place / "async", name[:-5]))


def test_a_failed_write_ends_the_run_at_the_next_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(checkpoint: dict[str, Any], path: Path) -> None:
        raise OSError(28, os.strerror(28))

    seen = []
    step = NanoChatModule.training_step

    def training_step(module: NanoChatModule, *args: Any) -> Any:
        seen.append(module.global_step)
        time.sleep(0.05)
        return step(module, *args)

    monkeypatch.setattr(checkpoint_io, "write", fail)
    monkeypatch.setattr(NanoChatModule, "training_step", training_step)
    settings = [*ASYNC, "trainer.max_steps=50", "trainer.val_check_interval=100"]
    with pytest.raises(UserError, match=r"step 2 cannot be saved in .*: No space left on device; free some"):
        train(configure(place, settings), place / "failed")
    assert max(seen) in (1, 2)
    assert not list((place / "failed/checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_write(place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write, step = checkpoint_io.write, NanoChatModule.training_step

    def slow(checkpoint: dict[str, Any], path: Path) -> None:
        time.sleep(0.3)
        write(checkpoint, path)

    def training_step(module: NanoChatModule, *args: Any) -> Any:
        if module.global_step == 2:
            os.kill(os.getpid(), number)
        return step(module, *args)

    monkeypatch.setattr(checkpoint_io, "write", slow)
    monkeypatch.setattr(NanoChatModule, "training_step", training_step)
    folder = place / f"signal-{number}"
    with pytest.raises(SystemExit) as caught:
        train(configure(place, [*ASYNC, "trainer.val_check_interval=100"]), folder)
    assert caught.value.code == 128 + number
    assert read_state(folder)["global_step"] == 3


def test_minutes_save_last_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of 0.4 minutes a step: the saves are those of steps 3 and 6, and the permanent one of step 5."""
    saved = []
    now = 0.0
    written, step = Checkpoint._written, NanoChatModule.optimizer_step

    def record(callback: Checkpoint, path: Path) -> None:
        written(callback, path)
        saved.append((path.name, read_state(path.parents[1])["global_step"]))

    def optimizer_step(module: NanoChatModule, *args: Any, **kwargs: Any) -> None:
        nonlocal now
        step(module, *args, **kwargs)
        now += 24.0

    monkeypatch.setattr(Checkpoint, "_written", record)
    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    monkeypatch.setattr(callback_module, "time", SimpleNamespace(monotonic=lambda: now))
    settings = [*BARE, "callbacks.checkpoint.every_n_minutes=1", "callbacks.checkpoint.every_n_train_steps=5"]
    train(configure(place, [*settings, "trainer.val_check_interval=100", "trainer.max_steps=9"]), place / "minutes")
    assert saved == [("last.ckpt", 3), ("step=5.ckpt", 5), ("last.ckpt", 8), ("step=9.ckpt", 9)]


def test_a_run_that_is_killed_with_a_save_by_minutes_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is last.ckpt, and no file with a step in its name: every reader takes it."""
    settings = [
        *BARE, "callbacks.checkpoint.every_n_train_steps=100", "callbacks.checkpoint.every_n_minutes=1e-9",
        "trainer.val_check_interval=100", "trainer.max_steps=5",
    ]  # fmt: skip
    killed = place / "killed_by_minutes"
    step_end = Checkpoint.on_step_end

    def on_step_end(callback: Checkpoint, trainer: Any, module: Any, step: int) -> None:
        step_end(callback, trainer, module, step)
        if step == 3:  # what a SIGKILL leaves
            shutil.copytree(place / "by_minutes", killed)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "on_step_end", on_step_end)
        train(configure(place, settings), place / "by_minutes")
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["last.ckpt"]
    assert newest_whole(killed / "checkpoints") == killed / "checkpoints" / "last.ckpt"
    found = describe(killed)
    assert (found["state"], found["step"]) == ("killed", 3)
    assert load_run(killed).meta["step"] == 3
    monkeypatch.setattr(Validation, "run", killed)
    assert Validation(place)._saved() == 3
    with pytest.raises(UserError, match="already holds a run with checkpoints"):
        train(configure(place, settings), killed)
    train(configure(place, [*settings, "ckpt_path=last"]), killed)
    same(read_state(place / "by_minutes"), read_state(killed))
    assert read_summary(killed)["status"] == "finished"
    assert find_checkpoint(killed, 5)[1].name == "step=5.ckpt"


def test_a_small_disk_is_noticed_before_the_first_save(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = SimpleNamespace(free=1e15)
    monkeypatch.setattr(callback_module.shutil, "disk_usage", lambda path: usage)
    settings = [*BARE, "trainer.max_steps=1", "trainer.val_check_interval=100"]
    with caplog.at_level(logging.WARNING):
        train(configure(place, settings), place / "space")
        assert "left on its disk" not in caplog.text
        usage.free = 3.5 * (place / "space/checkpoints/last.ckpt").stat().st_size
        train(configure(place, settings), place / "small_space")
    assert "left on its disk, and the next checkpoints need" in caplog.text  # three stay, and one is written aside


BAD = [({"every_n_minutes": 0}, "every_n_minutes=0 must"), ({"asynchronous": "yes"}, "asynchronous=yes must")]


@pytest.mark.parametrize(
    ("option", "text"),
    [({"every_n_minutes": 0}, "every_n_minutes=0 must"), ({"asynchronous": "yes"}, "asynchronous=yes")],
)
def test_bad_values(option: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Checkpoint(**option)


def write_until_killed(folder: Path, pipe: int) -> None:
    """Checkpoints of 0.8 MB, the one of step N filled with N; each number goes to the pipe once it was written."""
    weights = torch.zeros(100_000)
    states = [torch.zeros(50_000) for _ in range(2)]

    def then(path: Path) -> None:
        _repeat(path, folder / "last.ckpt", link=True)
        for old in sorted(folder.glob("step=*.ckpt"), key=lambda p: int(p.stem[5:]))[:-2]:
            old.unlink()
        os.write(pipe, f"{path.stem[5:]}\n".encode())

    writer = Writer(then)
    for step in range(1, 10_000):
        for tensor in (weights, *states):
            tensor.fill_(step)  # while the file before may still be being written
        content = {"state_dict": {"weights": weights}, "optimizer_states": states, "global_step": step}
        writer.take(content, folder / f"step={step}.ckpt")


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, kills: int) -> None:
    draw, seen = random.Random(), []
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        reader, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                write_until_killed(folder, pipe)
            finally:
                os._exit(1)
        os.close(pipe)
        reported = os.read(reader, 100)  # the first is there
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 1000):
            reported += more
        os.close(reader)
        promised = int(reported.split()[-1])
        found = newest_whole(folder)
        assert found == folder / "last.ckpt"
        content = read_checkpoint(folder / "last.ckpt")
        step = content["global_step"]
        assert step in (promised, promised + 1)
        for tensor in (content["state_dict"]["weights"], *content["optimizer_states"]):
            assert (tensor == step).all(), "of one step"
        seen.append(step)
    assert len(set(seen)) > 1 or kills < 10


def test_a_run_that_is_killed_while_it_writes_resumes_exactly(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of step 4 is half written when the process dies in step 5."""
    train(configure(place, ASYNC), place / "unkilled")
    folder = place / "killed"
    child = os.fork()
    if child == 0:
        write, step = checkpoint_io.write, NanoChatModule.training_step

        def half(checkpoint: dict[str, Any], path: Path) -> None:
            if path.name == "step=4.ckpt":
                (path.parent / f".{path.name}.{os.getpid()}.tmp").write_bytes(b"half")
                time.sleep(30.0)
            write(checkpoint, path)

        def training_step(module: NanoChatModule, *args: Any) -> Any:
            if module.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(module, *args)

        try:
            checkpoint_io.write, NanoChatModule.training_step = half, training_step  # type: ignore[method-assign]
            train(configure(place, ASYNC), folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert read_state(folder)["global_step"] == 2
    train(configure(place, [*ASYNC, "ckpt_path=last"]), folder)
    same(read_state(folder), read_state(place / "unkilled"))
    assert read_metrics(folder) == read_metrics(place / "unkilled")
    assert not list((folder / "checkpoints").glob(".*"))
