"""Every logger's files are read back: what a run has told it, and what it says when it cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger

from nanochat.config.compose import compose
from nanochat.config.signatures import check_nodes
from nanochat.errors import ConfigError, UserError
from nanochat.reports.loggers import build_loggers
from nanochat.run import train
from tests.runs import configure, read_metrics

SHORT = ["trainer.max_steps=3", "trainer.val_check_interval=3", "callbacks=none",
         "+callbacks.metrics._target_=nanochat.training.callbacks.metrics.MetricsCSV"]  # fmt: skip


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


def test_several_are_chosen_on_the_command_line() -> None:
    assert list(compose(["logger=[tensorboard,mlflow]"])["logger"]) == ["tensorboard", "mlflow"]
    with pytest.raises(ConfigError, match="logger has no option 'mlfow'; did you mean 'mlflow'"):
        compose(["logger=[tensorboard,mlfow]"])
    with pytest.raises(ConfigError, match="merge several options of one group"):
        compose(["model=[tiny,d20]"])


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
            r"logger=mlflow cannot be used \(Unsupported\w+: [^.]* unsupported URI 'no://x' [^.]*\)\.$",
        ),
    ],
)
def test_a_logger_that_cannot_start_is_one_sentence(configuration: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        build_loggers(configuration, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    node = {"_target_": "lightning.pytorch.loggers.MLFlowLogger"}
    with pytest.raises(UserError, match=r"not installed: pip install 'nanochat\[mlflow\]'\.$"):
        build_loggers({"logger": {"mlflow": node}}, tmp_path)


def test_tensorboard_is_checked_by_its_own_arguments() -> None:
    node = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": "x", "max_queue": 5}
    assert check_nodes(node, "logger.mine") == []
    assert "did you mean 'max_queue'" in str(check_nodes({**node, "max_quue": 5}, "logger.mine")[0])
    del node["save_dir"]
    assert [str(p).split(" is missing")[0] for p in check_nodes(node, "logger.mine")] == ["logger.mine.save_dir"]
