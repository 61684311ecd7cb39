"""What the callbacks write, and that they change nothing."""

from __future__ import annotations

import copy
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from nanochat import run_folder
from nanochat.config.schema import CONF
from nanochat.errors import UserError
from nanochat.model import GPT, GPTConfig
from nanochat.reports.curves import smooth, thin
from nanochat.run import train
from nanochat.run_folder import point_latest
from nanochat.training.callbacks import checkpoint as checkpoints
from nanochat.training.callbacks import throughput
from nanochat.training.callbacks.checkpoint import Checkpoint
from nanochat.training.callbacks.sampler import _fenced
from nanochat.training.callbacks.throughput import Throughput, flops_per_token
from nanochat.training.module import NanoChatModule
from tests.runs import TINY, configure, read_metrics, read_state, same, words

RUN = ["trainer.max_steps=5", "trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=2"]
BARE = [*RUN, "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callbacks")


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, dict[str, float]]:
    """A run with every callback, and its metrics."""
    folder = place / "outputs" / "today" / "whole"
    return folder, train(configure(place, RUN), folder)


def test_files_of_a_run(whole: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = whole
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {
        "config.yaml", "model.json", "tokenizer.json", "metrics.csv", "loss.png", "samples.md", "summary.json",
        "checkpoints", "checkpoints/last.ckpt", "checkpoints/step=2.ckpt", "checkpoints/step=4.ckpt",
        "checkpoints/step=5.ckpt",
    }  # fmt: skip
    assert os.path.samefile(folder / "checkpoints/last.ckpt", folder / "checkpoints/step=5.ckpt")
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "samples.md").read_text().count("## Step ") == 3
    assert os.readlink(folder.parent.parent / "latest") == "today/whole"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["step"] == 5
    assert summary["val/bpb"] == metrics["val/bpb"]
    assert summary["parameters"] == 98_816
    assert summary["tokens"] == 5 * 2 * 32
    assert set(summary["compression"]) == {"gzip -9", "xz -9e"}


def test_metrics(whole: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = whole
    rows = run_folder.read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [bool(row["val/bpb"]) for row in rows] == [False, True, False, True, True]
    assert metrics["val/loss"] == float(rows[-1]["val/loss"])
    state = read_state(folder)["optimizer_states"][0]["state"]
    size = sum(t.numel() * t.element_size() for values in state.values() for t in values.values() if torch.is_tensor(t))
    for row in rows:
        assert {"train/loss", "train/grad_norm", "train/lr"} <= {name for name, value in row.items() if value}
        assert float(row["train/tokens_per_second"]) > 0
        assert 0 <= float(row["train/data_wait"]) <= 1
        assert int(row["optim/bytes"]) == size
        assert row["skipped_steps"] == "0"


def test_callbacks_change_nothing(place: Path, whole: tuple[Path, dict[str, float]]) -> None:
    folder = place / "bare"
    train(configure(place, BARE), folder)
    assert read_metrics(folder) == read_metrics(whole[0])
    same(read_state(folder), read_state(whole[0]))


def test_rows_every_few_steps_and_all_checkpoints(place: Path) -> None:
    folder = place / "rare"
    settings = [*BARE, "callbacks.metrics.every_n_steps=3", "callbacks.checkpoint.keep=null", "trainer.max_steps=6"]
    train(configure(place, [*settings, "trainer.val_check_interval=4"]), folder)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == ["3", "4", "6"]
    assert all(row["train/loss"] for row in rows)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        *(f"step={n}.ckpt" for n in (2, 4, 6)),
        "last.ckpt",
    }


def test_new_columns_keep_the_old_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NanoChatModule.optimizer_step

    def optimizer_step(self: NanoChatModule, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.global_step == 2:  # not yet counted up: in step 3
            self.step_metrics["late/number"] = 0.5

    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    train(configure(place, BARE), place / "late")
    rows = read_metrics(place / "late")
    assert [row["late/number"] for row in rows] == ["", "", "0.5", "", ""]
    assert list(rows[0])[-3:] == ["skipped_steps", "val/loss", "val/bpb"]
    assert rows[1]["val/loss"]


def test_resume_drops_later_samples(place: Path, whole: tuple[Path, dict[str, float]]) -> None:
    folder = place / "samples"
    train(configure(place, RUN), folder)
    text = (folder / "samples.md").read_text()
    cut = text.index("## Step 4") + 30  # as a kill while it was written leaves it
    (folder / "samples.md").write_text(text[:cut] + "\n## Step 5\n\nof a run that was given up\n")
    train(configure(place, [*RUN, f"ckpt_path='{folder / 'checkpoints' / 'step=4.ckpt'}'"]), folder)
    assert (folder / "samples.md").read_text() == text == (whole[0] / "samples.md").read_text()


def test_latest_is_the_run_that_was_gone_on_with(place: Path) -> None:
    outputs = place / "again" / "outputs"
    settings = [*BARE, "trainer.max_steps=1"]
    for name in ("one", "two"):
        train(configure(place, settings), outputs / name)
    assert os.readlink(outputs / "latest") == "two"
    train(configure(place, [*settings, "trainer.max_steps=2", "ckpt_path=last"]), outputs / "one")
    assert os.readlink(outputs / "latest") == "one"


def test_speed_counts_each_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 2 x 40 tokens in 4 s, 1 s of it waiting for data; between them a validation of 100 s."""
    now = 0.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    loader = SimpleNamespace(wait_seconds=0.0)
    trainer: Any = SimpleNamespace(
        global_step=0, train_dataloader=loader, optimizers=[SimpleNamespace(state_bytes=lambda: 12)]
    )
    config = GPTConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, seq_len=32)
    module: Any = SimpleNamespace(gpt=GPT(config), device=torch.device("cpu"), step_metrics={})
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for step in (1, 2):
        for micro_step in range(2):
            now, loader.wait_seconds = now + 0.5, loader.wait_seconds + 0.5
            callback.on_train_batch_start(trainer, module, {"tokens": torch.zeros(2, 20)}, 0)
            now += 1.5
            trainer.global_step += micro_step
            callback.on_train_batch_end(trainer, module, None, None, 0)
        assert module.step_metrics == {
            "train/tokens_per_second": 20.0, "train/data_wait": 0.25, "optim/bytes": 12
        }, step  # fmt: skip
        callback.on_validation_start(trainer, module)
        now += 100.0


def test_resume_drops_later_rows_and_half_a_line(place: Path, whole: tuple[Path, dict[str, float]]) -> None:
    folder = place / "again"
    train(configure(place, BARE), folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write("6,1.0,")
    (folder / "checkpoints" / ".step=9.ckpt.77.tmp").write_bytes(b"half")
    path = folder / "checkpoints" / "step=2.ckpt"
    train(configure(place, [*BARE, f"ckpt_path='{path}'"]), folder)
    assert read_metrics(folder) == read_metrics(whole[0])
    same(read_state(folder), read_state(whole[0]))
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]


def poison(steps: set[int] | Callable[[int], bool]) -> Callable[..., Any]:
    """A training_step whose loss is NaN in these optimizer steps."""
    original = NanoChatModule.training_step

    def training_step(self: NanoChatModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = original(self, batch, batch_idx)
        bad = steps(self.global_step) if callable(steps) else self.global_step in steps
        return loss * float("nan") if bad else loss

    return training_step


def test_a_step_without_a_finite_gradient_is_dropped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, states = place / "dropped", []
    original = NanoChatModule.optimizer_step

    def optimizer_step(self: NanoChatModule, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        original(self, epoch, batch_idx, optimizer, closure)
        states.append(copy.deepcopy([self.state_dict(), optimizer.optimizer.state_dict()["state"]]))

    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    monkeypatch.setattr(NanoChatModule, "training_step", poison({2}))
    train(configure(place, [*BARE, "trainer.max_steps=4", "callbacks.checkpoint.every_n_train_steps=1"]), folder)
    assert [row["skipped_steps"] for row in read_metrics(folder)] == ["0", "0", "1", "1"]
    same(states[1], states[2])
    for one, other in ((0, 1), (2, 3)):
        assert not torch.equal(states[one][0]["gpt.embedding.weight"], states[other][0]["gpt.embedding.weight"])
    assert read_state(folder)["DataModule"]["consumed"] == 4
    assert not (folder / "checkpoints" / "step=3.ckpt").exists()  # it waited for a good step


def test_a_row_of_bad_steps_goes_back_with_half_the_rates(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = place / "back"
    attempts = []
    start = NanoChatModule.on_train_start

    def on_train_start(self: NanoChatModule) -> None:
        attempts.append((self.global_step, self.rate_scale))
        start(self)

    monkeypatch.setattr(NanoChatModule, "on_train_start", on_train_start)
    monkeypatch.setattr(NanoChatModule, "training_step", poison(lambda step: step >= 3 and len(attempts) < 3))
    settings = [*BARE, "callbacks.guard.patience=2", "trainer.val_check_interval=100", "trainer.max_steps=6"]
    with caplog.at_level(logging.WARNING):
        train(configure(place, [*settings, "schedule=constant", "schedule.warmup_steps=0"]), folder)
    assert attempts == [(0, 1.0), (2, 0.5), (2, 0.25)]
    assert caplog.text.count("Going back to") == 2
    rates = [float(row["train/lr"]) for row in read_metrics(folder)]
    assert rates == [rates[0]] * 2 + [rates[0] / 4] * 4
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["nanochat_run"]["rate_scale"] == 0.25
    train(configure(place, [*settings, "ckpt_path=last", "schedule=constant", "schedule.warmup_steps=0",
                            "trainer.max_steps=7"]), folder)  # fmt: skip
    assert float(read_metrics(folder)[-1]["train/lr"]) == rates[0] / 4


def test_a_run_that_always_diverges_gives_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NanoChatModule, "training_step", poison(lambda step: True))
    settings = [*BARE, "callbacks.guard.patience=2", "callbacks.guard.max_rollbacks=1"]
    with pytest.raises(UserError, match=r"diverges.*optim\.lr"):
        train(configure(place, settings), place / "diverged")
    assert json.loads((place / "diverged" / "summary.json").read_text())["status"] == "failed"


def test_weights_that_are_not_finite_are_never_saved(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NanoChatModule.optimizer_step

    def optimizer_step(self: NanoChatModule, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.global_step == 3:
            with torch.no_grad():
                self.gpt.norm.weight[0] = float("inf")

    monkeypatch.setattr(NanoChatModule, "optimizer_step", optimizer_step)
    settings = [*BARE, "callbacks.guard.patience=100"]
    train(configure(place, settings), place / "infinite")
    assert {p.name for p in (place / "infinite/checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}


def test_a_failed_save_leaves_the_old_one_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, as far as the process can see: files may not grow beyond a limit."""
    folder = place / "full"
    original, count = checkpoints.torch.save, 0

    def save(content: Any, file: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            return original(content, file)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            original(content, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(checkpoints.torch, "save", save)
    try:
        with pytest.raises(UserError, match=r"step 4 cannot be saved in .*: File too large"):
            train(configure(place, BARE), folder)
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last.ckpt", "step=2.ckpt"}
    assert read_state(folder)["global_step"] == 2


def test_time_limit_ends_at_a_step_and_saves(place: Path) -> None:
    folder = place / "timed"
    settings = ["trainer.max_steps=100000", "trainer.max_time=00:00:00:01", "trainer.accumulate_grad_batches=3"]
    metrics = train(configure(place, [*BARE, *settings, "trainer.val_check_interval=100000"]), folder)
    state, rows = read_state(folder), read_metrics(folder)
    assert 0 < state["global_step"] < 100_000
    assert state["DataModule"]["consumed"] == 3 * state["global_step"]
    assert int(rows[-1]["step"]) == state["global_step"]
    assert float(rows[-1]["val/loss"]) == metrics["val/loss"]


def test_an_exception_between_steps_saves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: NanoChatModule) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(NanoChatModule, "on_validation_epoch_end", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(configure(place, [*BARE, "callbacks.checkpoint.every_n_train_steps=100"]), place / "broken")
    assert read_state(place / "broken")["global_step"] == 2


def test_no_callbacks_at_all(place: Path) -> None:
    metrics = train(configure(place, ["trainer.max_steps=2", "callbacks=none"]), place / "none")
    assert metrics["val/bpb"] > 0
    assert not (place / "none" / "checkpoints").exists()


def test_synthetic_data_has_no_samples_and_no_bpb(place: Path) -> None:
    own = [word for word in TINY if word not in ("data=text", "model.vocab_size=auto")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*own, *RUN, "data=synthetic", "model.vocab_size=64"])
    metrics = train(cfg, place / "synthetic")
    assert "val/loss" in metrics
    assert "val/bpb" not in metrics
    assert not (place / "synthetic" / "samples.md").exists()


def test_latest_stays_out_of_other_folders(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    point_latest(tmp_path / "elsewhere" / "run")
    assert not list(tmp_path.rglob("latest"))
    for name in ("one", "two"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        point_latest(tmp_path / "outputs" / name)
        assert os.readlink(tmp_path / "outputs" / "latest") == name
    (tmp_path / "outputs" / "latest").unlink()
    (tmp_path / "outputs" / "latest").mkdir()
    point_latest(tmp_path / "outputs" / "one")
    assert not (tmp_path / "outputs" / "latest").is_symlink()


def test_wandb_without_an_account(place: Path) -> None:
    """In a process of its own, since the client keeps state and reads the environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(place), "OMP_NUM_THREADS": "1", "NETRC": str(place / "none")}
    command = [sys.executable, "-m", "nanochat.cli", "train", *words(place), *RUN, "logger=wandb",
               f"hydra.run.dir={place / 'account'}"]  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=CONF.parent, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "wandb" in errors[0].lower()
    assert "Traceback" not in done.stderr


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="keep=0"):
        Checkpoint(keep=0)


def test_operations_per_token_against_a_count_by_hand() -> None:
    config = GPTConfig(vocab_size=100, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, seq_len=32)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert flops_per_token(GPT(config)) == 6 * (2 * layer + 100 * 64) + 12 * 2 * 64 * 32


def test_curves() -> None:
    points = [(i, float(i % 2)) for i in range(1, 10_001)]
    thinned = thin(points)
    assert len(thinned) == 2000
    assert thinned[0] == (5, 0.6)
    assert [value for _, value in smooth([(1, 2.0), (2, 2.0), (3, 2.0)])] == [2.0, 2.0, 2.0]
    assert smooth(points)[-1][1] == pytest.approx(0.5, abs=0.01)


def test_a_sample_cannot_end_its_block() -> None:
    assert _fenced("a\n```\nb") == "````\na\n```\nb\n````"
