"""metrics.csv: its rows, and what a resume keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import run_folder
from nanochat.reports.curves import curve
from nanochat.run import train
from nanochat.training.module import NanoChatModule
from tests.runs import configure, read_metrics, read_state, same
from tests.training.callbacks.short_runs import BARE


def training(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["train/loss"]]


def test_an_optimizer_step_and_a_validation_have_a_row_each(whole: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = whole
    rows = run_folder.read_metrics(folder / "metrics.csv")
    assert [(row["step"], bool(row["val/bpb"])) for row in rows] == [
        ("1", False), ("2", False), ("2", True), ("3", False), ("4", False), ("4", True), ("5", False), ("5", True)
    ]  # fmt: skip
    assert metrics["val/loss"] == float(rows[-1]["val/loss"])
    state = read_state(folder)["optimizer_states"][0]["state"]
    size = sum(t.numel() * t.element_size() for values in state.values() for t in values.values() if torch.is_tensor(t))
    for row in rows:
        if row["val/bpb"]:
            assert {name for name, value in row.items() if value} == {"step", "val/loss", "val/bpb"}
            continue
        assert {"train/loss", "train/grad_norm", "train/lr"} <= {name for name, value in row.items() if value}
        assert float(row["train/tokens_per_second"]) > 0
        assert 0 <= float(row["train/data_wait"]) <= 1
        assert int(row["optim/bytes"]) == size
        assert row["skipped_steps"] == "0"


def test_rows_every_few_steps_and_all_checkpoints(place: Path) -> None:
    folder = place / "rare"
    settings = [*BARE, "callbacks.metrics.every_n_steps=3", "callbacks.checkpoint.keep=null", "trainer.max_steps=6"]
    train(configure(place, [*settings, "trainer.val_check_interval=4"]), folder)
    rows = read_metrics(folder)
    assert [row["step"] for row in training(rows)] == ["3", "6"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["4", "6"]
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
    assert [row["late/number"] for row in training(rows)] == ["", "", "0.5", "", ""]
    assert list(rows[0])[-3:] == ["skipped_steps", "val/loss", "val/bpb"]
    assert [row["step"] for row in rows if row["val/loss"]] == ["2", "4", "5"]


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


def test_a_file_of_an_earlier_version_is_continued(place: Path, whole: tuple[Path, dict[str, float]]) -> None:
    """There a validation's numbers stood in the row of its step."""
    folder = place / "earlier"
    train(configure(place, BARE), folder)
    merged: dict[str, dict[str, str]] = {}
    for row in run_folder.read_metrics(folder / "metrics.csv"):
        merged.setdefault(row["step"], {}).update({name: value for name, value in row.items() if value})
    lines = [",".join(merged["2"])]
    lines += [",".join(row.get(name, "") for name in merged["2"]) for row in merged.values()]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    train(configure(place, [*BARE, f"ckpt_path='{folder / 'checkpoints' / 'step=4.ckpt'}'"]), folder)
    found, expected = read_metrics(folder), read_metrics(whole[0])
    for name in ("train/loss", "train/lr", "val/loss", "val/bpb"):
        assert curve(found, name) == curve(expected, name)
    assert found[2:] == expected[3:]
