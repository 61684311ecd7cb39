"""Weights & Biases without a network: what offline runs hold is read back through W&B's protobufs."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.config.schema import CONF
from nanochat.errors import UserError
from nanochat.reports import wandb_account, wandb_files
from nanochat.reports.loggers import build_loggers
from nanochat.reports.panels import BLOCKS, SAMPLES, SUMMARY
from nanochat.reports.wandb_logger import WandbLogger
from nanochat.studies.wandb_commands import main
from tests.runs import read_metrics, words

TOKENS = 2 * 32
"""of a step"""
RUN = ["callbacks.ternary_health.every_n_steps=1", "callbacks.checkpoint.every_n_train_steps=1", "+mtp=on",
       "+collider=on", "callbacks.sampler.max_tokens=4", "~callbacks.loss_plot",
       "trainer.val_check_interval=2"]  # fmt: skip
SCRIPT = """
import json, os, sys
from pathlib import Path
from nanochat.environment import prepare_environment
prepare_environment()
from nanochat.launch import main
words, folder, cut = json.loads(sys.argv[1])
assert main([*words, "trainer.max_steps=4", f"hydra.run.dir={folder}"]) == 0
checkpoints = Path(folder) / "checkpoints"
if cut:  # as a kill after step 4 leaves it: the client had written less than it was given, the last save is older
    (path,) = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
os.unlink(checkpoints / "last.ckpt"), os.unlink(checkpoints / "step=4.ckpt")
os.link(checkpoints / "step=3.ckpt", checkpoints / "last.ckpt")
assert main([*words, "trainer.max_steps=6", f"hydra.run.dir={folder}", "ckpt_path=last"]) == 0
"""


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return clean | {"OMP_NUM_THREADS": "1", "NETRC": "/nowhere"} | more


def shown(place: Path, command: list[str], **more: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, *command],
        env=environment(**more), cwd=CONF.parent, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# ---- what is read back ----------------------------------------------------------------------------------------------


def wandb_records(folder: Path) -> list[list[Any]]:
    """The records of a run's .wandb files, one for each session.

    The file is a log of LevelDB's format behind a header of 7 bytes: blocks of 32 KiB, in each of them chunks of
    crc (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and data. A record is a protobuf of W&B's.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    sessions = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, place, parts, records = path.read_bytes(), 7, b"", []
        assert data.startswith(b":W&B")
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            assert kind in (1, 2, 3, 4)
            if place + 7 + length > len(data):  # cut off
                break
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                records.append(Record.FromString(parts))
                parts = b""
        sessions.append(records)
    return sessions


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


def configuration(records: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records:
        if record.HasField("run"):
            found |= _values(record.run.config.update)
        if record.HasField("config"):
            found |= _values(record.config.update)
    return found


@pytest.fixture(scope="module")
def closed_port() -> str:
    """A server that is not there."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, closed_port: str) -> tuple[Path, str]:
    """A run that lost the last rows on their way to W&B, was set back by a step, and went on."""
    place = tmp_path_factory.mktemp("wandb")
    folder = place / "run"
    own = [*words(place), *RUN, "logger=wandb", "logger.wandb.offline=auto", "logger.wandb.log_model=true", "tags=[a]"]
    said = shown(place, ["-c", SCRIPT, json.dumps([own, str(folder), 0.7])],
                 WANDB_API_KEY="0" * 40, WANDB_BASE_URL=closed_port)  # fmt: skip
    return folder, said


def test_a_run_without_a_network_goes_on_offline_where_that_was_said(resumed: tuple[Path, str]) -> None:
    assert "cannot be reached: no network?; the run is logged offline" in resumed[1]


def test_every_row_is_logged_once_whatever_a_kill_has_lost(resumed: tuple[Path, str]) -> None:
    folder, _ = resumed
    sessions = wandb_records(folder)
    assert len(sessions) == 2
    first = [row["_step"] for row in history(sessions[0]) if "train/loss" in row]
    assert 0 < len(first) < 4  # the tail is gone
    assert len({r.run.run_id for records in sessions for r in records if r.HasField("run")}) == 1
    rows = [row for records in sessions for row in history(records)]
    for name, steps in (("train/loss", [1, 2, 3, 4, 5, 6]), ("val/bpb", [2, 4, 6])):
        found = [row for row in rows if name in row]
        assert [row["_step"] for row in found] == [row["trainer/global_step"] for row in found] == steps
        assert [row["tokens"] for row in found] == [TOKENS * step for step in steps]
        assert [row[name] for row in found] == [float(row[name]) for row in read_metrics(folder) if row[name]]


def test_a_run_says_all_that_it_has(resumed: tuple[Path, str]) -> None:
    folder, _ = resumed
    records = wandb_records(folder)[-1]
    rows = history(records)
    keys = {key for row in rows for key in row}
    assert {"ternary/zeros", "ternary/flips_1", "ternary/scale_0", "train/grad_norm", "mtp/loss_2"} <= keys
    assert {"val/mtp_acceptance_2", "collider/kept_fraction", "samples/nrows"} <= keys
    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert all(axes[f"{section}/*"] == "tokens" for section in ("train", "val", "mtp", "ternary", "optim"))
    told, said = summary(records), json.loads((folder / "summary.json").read_text())
    for key in ("status", "parameters", "tokens", "val/bpb"):
        assert told[key] == said[key]
    assert told["compression/xz -9e"] == said["compression"]["xz -9e"]
    assert told["best/val/bpb"] == min(float(row["val/bpb"]) for row in read_metrics(folder) if row["val/bpb"])
    config = configuration(wandb_records(folder)[0])
    assert config["optim"]["lr"] == 0.02
    assert config["choice"]["model"] == "tiny"
    assert config["choice"]["mtp"] == "on"
    (run,) = [r.run for r in records if r.HasField("run")][:1]
    assert (run.project, run.run_group, run.job_type, list(run.tags)) == ("nanochat", "", "train", ["a"])
    models = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "model"]
    assert [artifact.name for artifact in models] == [f"model-{run.run_id}"]
    files = {entry.path for entry in models[0].manifest.contents}
    assert files == {"checkpoints/last.ckpt", "config.yaml", "model.json", "tokenizer.json"}


def test_our_reader_reads_what_is_whole(resumed: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = resumed
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    rows = [row for records in wandb_records(folder) for row in history(records)]
    assert list(wandb_files.history(folder, run_id)) == rows
    with pytest.raises(ValueError, match="was not written by W&B"):
        list(wandb_files.records(folder / "wandb.json"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    place = tmp_path_factory.mktemp("sweep")
    folder = place / "2026-01-31" / "10-00-00-sweep"
    command = ["-m", "nanochat.cli", "train", *words(place), *RUN, "trainer.max_steps=2", "logger=wandb",
               "logger.wandb.offline=true", "-m", "seed=0,1", f"hydra.sweep.dir='{folder}'"]  # fmt: skip
    return folder, shown(place, command)


def test_a_sweep_in_wandb_is_quiet_and_grouped_by_its_date(swept: tuple[Path, str]) -> None:
    folder, said = swept
    assert "wandb:" not in said
    for job in "01":
        (records,) = wandb_records(folder / job)
        (run,) = [r.run for r in records if r.HasField("run")][:1]
        assert run.run_group == "2026-01-31 10-00-00-sweep"
        assert run.display_name == f"seed={job}"


def test_every_panel_finds_its_metrics_and_the_local_page_has_the_same(
    resumed: tuple[Path, str], swept: tuple[Path, str], tmp_path: Path
) -> None:
    """But for those of a GPU."""
    here = [panel for block in BLOCKS for panel in block.panels if block.needs != "a GPU"]
    for run in (resumed[0], swept[0] / "0", swept[0] / "1"):
        sessions = wandb_records(run)
        rows = [row for records in sessions for row in history(records)]
        keys = {key for row in rows for key in row}
        assert [panel.title for panel in here if not panel.found(keys)] == []
        assert {f"{SAMPLES}/nrows", "tokens", "_runtime"} <= keys
        assert set(SUMMARY) <= set(summary(sessions[-1]))
    for folder, count in ((resumed[0], 1), (swept[0], 2)):
        path = tmp_path / "page.html"
        assert main(["dashboard", "--offline", str(folder), "--html", str(path)]) == 0
        page = path.read_text()
        assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [panel.title for panel in here]
        assert page.count("<h3>") == count  # texts of each
        for key in SUMMARY:
            assert f">{key}</th>" in page
        assert "Use of the GPU, Peak memory (of runs with a GPU)." in page


# ---- an account and a network ---------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server that says what a test wants it to; `seen` has the keys."""
    state = SimpleNamespace(status=200, body={"data": {"viewer": {"id": "x"}}}, wait=0.0, seen=[])
    release = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            state.seen.append(self.headers.get("Authorization"))
            release.wait(state.wait)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                self.send_response(state.status)
                self.end_headers()
                self.wfile.write(json.dumps(state.body).encode())

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        state.url = f"http://127.0.0.1:{found.server_address[1]}"
        threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
        for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        yield state
        release.set()
        found.shutdown()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"body": {"data": {"viewer": None}}}, "does not accept the API key"),
        ({"status": 401}, "does not accept the API key"),
        ({"status": 503}, "answers with status 503"),
        ({"wait": 30.0}, "has not answered in 0.5 s"),
    ],
)
def test_a_server_is_asked_before_training(server: SimpleNamespace, changes: dict[str, Any], said: str | None) -> None:
    vars(server).update(changes)
    found = wandb_account.problem(server.url, 0.5 if "wait" in changes else 5.0)
    assert found is None if said is None else said in str(found)
    assert len(server.seen) == 1
    assert server.seen[0].startswith("Basic ")


def test_no_network_is_one_sentence_within_seconds(
    server: SimpleNamespace, closed_port: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", closed_port)
    node = {"_target_": "nanochat.reports.wandb_logger.WandbLogger", "timeout": 5.0}
    with pytest.raises(UserError, match=r"^W&B cannot be used: 127\.0\.0\.1:\d+ cannot be reached: no network\?; "):
        build_loggers({"logger": {"wandb": node}}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_keys_are_found_where_the_client_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert wandb_account.api_key() is None
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password one\nmachine own.host login u password 2")
    assert wandb_account.api_key() == "one"
    (tmp_path / "settings").write_text("[default]\nbase_url = https://own.host/\n")
    assert wandb_account.server() == "https://own.host"
    assert wandb_account.api_key() == "2"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.host")
    assert wandb_account.api_key() is None
    (tmp_path / "netrc").write_text("machine machine machine")
    assert wandb_account.api_key() is None


# ---- online, with the client's run in place of a server -------------------------------------------------------------


class Client:
    """What the logger uses of W&B's run."""

    def __init__(self, step: int, resumed: bool) -> None:
        self.id, self.step, self.resumed = "abc", step, resumed
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append((step, row))

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def use_artifact(self, artifact: Any) -> None:
        self.inputs.append(artifact)

    def log_artifact(self, artifact: Any) -> None:
        self.outputs.append(artifact)


def online(folder: Path, client: Client, ckpt_path: str | None, **options: Any) -> WandbLogger:
    """A logger as it is once the server has answered."""
    return logged_by(client, folder, ckpt_path, offline=False, **options)


def logged_by(client: Client, folder: Path, ckpt_path: str | None, offline: bool, **options: Any) -> WandbLogger:
    logger = WandbLogger(save_dir=str(folder), offline=True, **options)
    logger.offline, logger._experiment = offline, client
    logger.begin(folder, {"ckpt_path": ckpt_path, "data": {"batch_size": 2, "seq_len": 32}, "trainer": {}})
    return logger


def test_a_resume_asks_the_server_for_its_last_row(tmp_path: Path) -> None:
    online(tmp_path, Client(0, False), None)
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/bpb\n1,5.0,\n2,4.0,\n3,3.0,\n3,,2.5\n")
    client = Client(2, True)  # it has the row of step 1
    logger = online(tmp_path, client, "last")
    assert logger._wandb_init["id"] == "abc"
    logger.log_metrics({"train/loss": 2.0}, step=4)
    logger.log_metrics({"val/bpb": 2.25}, step=4)
    logger.log_metrics({"train/loss": 9.0}, step=4)  # a run that has gone back to a checkpoint
    found = [(step, {k: v for k, v in row.items() if "/" in k and "global" not in k}) for step, row in client.rows]
    assert found == [
        (2, {"train/loss": 4.0}), (3, {"train/loss": 3.0}), (3, {"val/bpb": 2.5}), (4, {"train/loss": 2.0}),
        (4, {"val/bpb": 2.25}),
    ]  # fmt: skip
    assert client.summary == {"best/val/bpb": 2.25}


def _went_online(folder: Path, killed: bool) -> None:
    """As if the sessions of an offline run had been online ones: the client keeps the same log of those."""
    for place in folder.glob("wandb/offline-run-*"):
        place.rename(place.with_name(place.name.removeprefix("offline-")))
    record = json.loads((folder / "wandb.json").read_text())
    logged = {} if killed else record["logged"]
    (folder / "wandb.json").write_text(json.dumps(record | {"offline": False, "logged": logged}))


def _train(logger: WandbLogger, steps: range) -> None:
    for step in steps:
        logger.log_metrics({"train/loss": 1.0, "val/bpb": 2.0, "samples/nrows": 3}, step=step)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "cleaned"])
def test_online_rows_are_not_logged_offline_again(
    resumed: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    """What they were is known by the client's files, or, once `wandb clean` has removed them, by the record."""
    folder = shutil.copytree(resumed[0], tmp_path / "run")
    _went_online(folder, killed)
    if not killed:
        shutil.rmtree(folder / "wandb")
    client = Client(0, False)
    logger = logged_by(client, folder, "last", offline=True)
    assert "goes on offline: what was logged up to step 6 counts as uploaded" in caplog.text
    _train(logger, range(5, 9))
    assert [step for step, _ in client.rows] == [7, 8]
    assert json.loads((folder / "wandb.json").read_text())["offline"] is True


def test_offline_rows_that_were_logged_online_are_not_synced(
    resumed: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(resumed[0], tmp_path / "run")
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    first, last = wandb_files.unsynced(folder, run_id)
    first.with_name(f"{first.name}.synced").touch()  # the user has synced the first session: steps 1 to 3
    client = Client(4, True)
    logger = online(folder, client, "last")
    assert "goes on online" in caplog.text
    assert wandb_files.unsynced(folder, run_id) == [last]  # until its rows are logged
    _train(logger, range(7, 8))
    assert [(step, "val/bpb" in row) for step, row in client.rows] == [
        (4, False), (4, True), (5, False), (6, False), (6, True), (7, True),
    ]  # fmt: skip
    assert wandb_files.unsynced(folder, run_id) == []
    from wandb.cli.beta_sync import _is_synced  # what `wandb sync` asks

    assert _is_synced(last)


def test_a_folder_that_is_trained_anew_is_another_run(tmp_path: Path) -> None:
    online(tmp_path, Client(0, False), None)
    for changes in ({"ckpt_path": None}, {"ckpt_path": "last", "project": "other"}, {"ckpt_path": "auto", "id": "own"}):
        logger = online(tmp_path, Client(0, False), **changes)
        assert logger._wandb_init["id"] == changes.get("id")
        online(tmp_path, Client(0, False), None)


def test_a_checkpoint_has_its_data_as_an_input(tmp_path: Path) -> None:
    client = Client(0, False)
    client.config = {"data": {"corpus": "text"}, "tokenizer": {}}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (tmp_path / "model.json").write_text("{}")
    said = dict.fromkeys(("parameters", "tokens", "seconds", "data", "commit"), 1)
    logger = online(tmp_path, client, None, log_model=True)
    logger.log_summary({"status": "failed", **said})
    assert (client.inputs, client.outputs) == ([], [])
    logger.log_summary({"status": "finished", "step": 3, **said})
    assert [(a.type, set(a.manifest.entries)) for a in client.inputs] == [("dataset", {"data.json"})]
    (model,) = client.outputs
    assert (model.type, set(model.manifest.entries)) == ("model", {"checkpoints/last.ckpt", "model.json"})
    assert model.metadata["step"] == 3
