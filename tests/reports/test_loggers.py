"""Every logger's files are read back: what a run has told it, and what it says when it cannot be used."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from nanochat.config.schema import CONF
from nanochat.config.signatures import check_nodes
from nanochat.errors import UserError
from nanochat.reports.loggers import build_loggers
from nanochat.run import train
from tests.runs import configure, read_metrics, words

SHORT = ["trainer.max_steps=3", "trainer.val_check_interval=3", "callbacks=none",
         "+callbacks.metrics._target_=nanochat.training.callbacks.metrics.MetricsCSV"]  # fmt: skip
TOKENS = 2 * 32
"""of a step"""


def losses(folder: Path) -> list[float]:
    return [float(row["train/loss"]) for row in read_metrics(folder) if row["train/loss"]]


# ---- what is read back ----------------------------------------------------------------------------------------------


def tensorboard(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def mlflow(folder: Path) -> tuple[list[tuple[int, float]], Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlruns'}")
    experiment = client.get_experiment_by_name("nanochat")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")], run


def wandb_records(folder: Path) -> list[Any]:
    """The records of a run's .wandb file.

    The file is a log of LevelDB's format behind a header of 7 bytes: blocks of 32 KiB, in each of them chunks of
    crc (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and data. A record is a protobuf of W&B's.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, parts, records = path.read_bytes(), 7, b"", []
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind in (1, 2, 3, 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def history(records: list[Any]) -> list[dict[str, Any]]:
    return [_values(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]


def summary(records: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            found |= _values(record.summary.update)
    return found


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a run"
    train(configure(tmp_path, [*SHORT, "logger=[tensorboard,mlflow]"]), folder)
    expected = losses(folder)
    assert len(expected) == 3
    assert tensorboard(folder) == [(step, pytest.approx(value)) for step, value in enumerate(expected, 1)]
    found, run = mlflow(folder)
    assert found == [(step, pytest.approx(value)) for step, value in enumerate(expected, 1)]
    assert run.info.status == "FINISHED"
    assert run.data.params["cfg/trainer/max_steps"] == "3"
    assert run.data.tags["mlflow.runName"] == "run"  # no preset is chosen outside of Hydra
    assert not {"mlruns", "tensorboard"} & {path.name for path in tmp_path.iterdir()}


def test_wandb(tmp_path: Path) -> None:
    """In a process of its own, since its client reads the environment once."""
    folder = tmp_path / "run"
    command = [*words(tmp_path), *SHORT, "logger=wandb", "logger.wandb.offline=true", f"hydra.run.dir='{folder}'"]
    shown(tmp_path, command)
    records = wandb_records(folder)
    rows = [row for row in history(records) if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == losses(folder)
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 3]
    assert [row["tokens"] for row in rows] == [TOKENS, 2 * TOKENS, 3 * TOKENS]
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert (axes["train/*"], axes["val/*"]) == ("tokens", "tokens")
    told, said = summary(records), json.loads((folder / "summary.json").read_text())
    for key in ("status", "parameters", "tokens", "val/bpb"):
        assert told[key] == said[key]
    assert told["compression/xz -9e"] == said["compression"]["xz -9e"]
    (run,) = [r.run for r in records if r.HasField("run")][:1]
    assert (run.project, run.run_group) == ("nanochat", "")


def test_a_sweep_in_wandb_is_quiet_and_grouped_by_its_date(tmp_path: Path) -> None:
    command = [*words(tmp_path), *SHORT, "logger=wandb", "logger.wandb.offline=true", "-m", "seed=0,1",
               f"hydra.sweep.dir='{tmp_path}/2026-01-31/10-00-00-sweep'"]  # fmt: skip
    said = shown(tmp_path, command)
    assert "wandb:" not in said
    for job in "01":
        records = wandb_records(tmp_path / "2026-01-31" / "10-00-00-sweep" / job)
        (run,) = [r.run for r in records if r.HasField("run")][:1]
        assert run.run_group == "2026-01-31 10-00-00-sweep"
        assert run.display_name == f"seed={job}"


def shown(place: Path, overrides: list[str]) -> str:
    """What a run prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.cli", "train", *overrides],
        env=environment, cwd=CONF.parent, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# ---- loggers of the user's own --------------------------------------------------------------------------------------


class Minimal(Logger):
    """What Lightning demands of a logger, and no more."""

    name, version = "minimal", "0"

    def __init__(self, save_dir: str = "", fails: bool = False) -> None:
        super().__init__()
        self.place, self.fails, self.rows = save_dir, fails, 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += 1
        if self.fails:
            raise ConnectionError("the server\nis gone.")
        (Path(self.place) / "rows.txt").open("a").write(f"{step} {sorted(metrics)}\n")


class Broken(Minimal):
    @property
    def experiment(self) -> Any:
        raise AttributeError("no account.")


def own(kind: type, **options: Any) -> dict[str, Any]:
    return {"logger": {"mine": {"_target_": f"{__name__}.{kind.__name__}", **options}}}


def test_a_minimal_logger(tmp_path: Path) -> None:
    settings = [*SHORT, "logger=none", f"+logger.mine._target_={__name__}.Minimal", "+logger.mine.save_dir=."]
    train(configure(tmp_path, settings), tmp_path / "run")
    rows = (tmp_path / "run" / "rows.txt").read_text().splitlines()
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "3"]
    assert "val/bpb" in rows[-1]


def test_a_logger_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = [*SHORT, "logger=none", f"+logger.mine._target_={__name__}.Minimal", "+logger.mine.fails=true"]
    assert train(configure(tmp_path, settings), tmp_path / "run")["val/bpb"] > 0
    sentence = "logger=mine misses something (ConnectionError: the server is gone); the run goes on."
    assert caplog.text.count(sentence) == 1


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        (own(Broken), r"logger=mine cannot be used \(AttributeError: no account\)\.$"),
        (
            {"logger": {"mlflow": {"_target_": "lightning.pytorch.loggers.MLFlowLogger", "tracking_uri": "no://x"}}},
            r"logger=mlflow cannot be used \(.*unsupported URI 'no://x'.*\)\.$",
        ),
    ],
)
def test_a_logger_that_cannot_start_is_one_sentence(configuration: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build_loggers(configuration, tmp_path)
    assert "\n" not in str(caught.value)


def test_tensorboard_is_checked_by_its_own_arguments() -> None:
    node = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": "x", "max_queue": 5}
    assert check_nodes(node, "logger.mine") == []
    assert "did you mean 'max_queue'" in str(check_nodes({**node, "max_quue": 5}, "logger.mine")[0])
    del node["save_dir"]
    assert [str(p).split(" is missing")[0] for p in check_nodes(node, "logger.mine")] == ["logger.mine.save_dir"]
