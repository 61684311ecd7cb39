"""A run that changes between online and offline, with W&B's own client, `wandb sync`, and a stand-in for the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.config.schema import CONF
from tests.reports.test_wandb import environment
from tests.reports.wandb_server import Server, serving

pytestmark = pytest.mark.slow
SESSION = """
import os, signal, sys, time
from pathlib import Path
from nanochat.reports.wandb_logger import WandbLogger
folder, offline, first, last, killed = Path(sys.argv[1]), sys.argv[2] == "offline", *map(int, sys.argv[3:])
logger = WandbLogger(save_dir=str(folder), offline=offline)
checkpoint = "last" if first > 1 else None
logger.begin(folder, {"ckpt_path": checkpoint, "data": {"batch_size": 2, "seq_len": 32}, "trainer": {}})
path = folder / "metrics.csv"
lines = path.read_text().splitlines() if path.exists() else ["step,train/loss,val/bpb"]
lines = [line for line in lines if line.startswith("step") or int(line.split(",")[0]) < first]
for step in range(first, last + 1):
    for name in ("train/loss", "val/bpb") if step % 2 == 0 else ("train/loss",):
        lines.append(f"{step},9.0," if name == "train/loss" else f"{step},,4.0")
        path.write_text("\\n".join(lines) + "\\n")
        logger.log_metrics({name: 9.0 if name == "train/loss" else 4.0}, step=step)
if killed:
    time.sleep(5)  # what was logged is on its way
    os.kill(os.getpid(), signal.SIGKILL)
logger.experiment.finish()
"""


def run(server: Server, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        env=environment(WANDB_API_KEY="k" * 40, WANDB_BASE_URL=server.url, WANDB_ERROR_REPORTING="false"),
        cwd=CONF.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode in (0, -9), done.stderr
    return done.stderr


@pytest.mark.parametrize("modes", [("online", "offline"), ("offline", "online")], ids=" then ".join)
def test_every_row_comes_to_the_server_once(tmp_path: Path, modes: tuple[str, str]) -> None:
    """The first session is killed after step 4, and the second goes on from the checkpoint of step 3."""
    with serving() as server:
        run(server, "-c", SESSION, str(tmp_path), modes[0], "1", "4", "1")
        said = run(server, "-c", SESSION, str(tmp_path), modes[1], "4", "6", "0")
        assert f"this run was {modes[0]} and goes on {modes[1]}" in said
        run(server, "-m", "wandb", "sync", str(tmp_path / "wandb"))
        [rows] = server.rows.values()
    found = [(row["_step"], "train/loss" in row, "val/bpb" in row) for row in rows]
    assert found == [(step, True, step % 2 == 0) for step in range(1, 7)]
