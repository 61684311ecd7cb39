"""What a run with all callbacks leaves behind, and that they change nothing of the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

from nanochat.config.schema import CONF
from nanochat.run import train
from tests.runs import TINY, configure, read_metrics, read_state, same, words
from tests.training.callbacks.short_runs import BARE, RUN


def test_files_of_a_run(whole: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = whole
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names == {
        "config.yaml", "command.json", "model.json", "tokenizer.json", "metrics.csv", "loss.png", "samples.md",
        "summary.json", "checkpoints", "checkpoints/last.ckpt", "checkpoints/step=2.ckpt", "checkpoints/step=4.ckpt",
        "checkpoints/step=5.ckpt", "heartbeat.json",
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


def test_callbacks_change_nothing(place: Path, whole: tuple[Path, dict[str, float]]) -> None:
    folder = place / "bare"
    train(configure(place, BARE), folder)
    assert read_metrics(folder) == read_metrics(whole[0])
    same(read_state(folder), read_state(whole[0]))


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
