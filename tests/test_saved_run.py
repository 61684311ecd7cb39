"""A run, its prepared data and its file, written by the version before the present layout of the package."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from nanochat import launch
from nanochat.checkpoint import load_run
from nanochat.config.check import check
from nanochat.config.renamed import rename_targets
from nanochat.export.cli import export_main
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.verify import verify

SAVED = Path(__file__).parent / "fixtures" / "saved_run"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A copy, its texts as old as they were when the data was prepared."""
    shutil.copytree(SAVED, tmp_path / "saved", symlinks=True)
    for name, time in json.loads((SAVED / "mtimes.json").read_text()).items():
        os.utime(tmp_path / "saved" / "text" / name, ns=(time, time))
    return tmp_path / "saved"


def losses(path: Path) -> list[tuple[int, float]]:
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]


def test_it_resumes_as_it_did(saved: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> None:
    data = [f"data.paths=['{saved}/text']", f"data.cache_dir='{saved}/cache'"]
    prepared = {path: path.stat().st_mtime_ns for path in (saved / "cache").rglob("*")}
    with caplog.at_level(logging.INFO):
        code = launch.main(["--resume", str(saved / "run"), "trainer.max_steps=9", *data])
    assert code == 0, capfd.readouterr().err
    assert "Preparing" not in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (saved / "cache").rglob("*")} == prepared
    expected, found = losses(saved / "continued.csv"), losses(saved / "run" / "metrics.csv")
    assert [step for step, _ in found] == list(range(1, 10))
    for (step, old), (_, new) in zip(expected, found, strict=True):
        assert new == pytest.approx(old, rel=1e-4), step


def test_its_model_is_read_and_exported(saved: Path) -> None:
    run = load_run(saved / "run")
    assert (run.meta["step"], run.config.dim, run.tokenizer.vocab_size) == (6, 32, 257)
    assert any("mtp" in name for name in run.objectives)
    out = saved / "again.gguf"
    assert export_main([str(saved / "run"), "--to", "gguf", "--type", "f32", "--out", str(out)]) == 0
    with (
        GGUFFile(saved / "run.gguf") as before,
        GGUFFile(out) as now,
    ):  # metadata: new keys
        assert set(before.tensors) == set(now.tensors)
        for tensor in before.tensors:
            assert before.raw(tensor) == now.raw(tensor), tensor


def test_its_file_is_read_back_by_us(saved: Path) -> None:
    assert verify(saved / "run.gguf", load_run(saved / "run")).passed


def test_every_old_target_has_a_present_name(saved: Path) -> None:
    """Of the run's features and callbacks, and of the callbacks that it did not use."""
    old = yaml.safe_load((saved / "run" / "config.yaml").read_text())
    names = ("sampler.TextSampler", "loss_plot.LossPlot", "early_stopping.EarlyStopping")
    old["callbacks"] |= {name: {"_target_": f"nanochat.lightning.callbacks.{name}"} for name in names}
    old["callbacks"] = {name.replace(".", "_"): node for name, node in old["callbacks"].items()}
    old["data"]["paths"] = [str(saved / "text")]
    new = rename_targets(old)
    assert check(DictConfig(new)).values["collider"]["sparsity"] == 0.4
    assert "nanochat.lightning" not in str(new)
    assert rename_targets(new) == new
