"""nanochat validate: the whole way, with a kill in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat import cli
from nanochat.errors import UserError
from nanochat.validate import EVERY, StageError, Validation, main
from tests.runs import write_text

SMALL = [
    "model.dim=64", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=128", "data=text",
    "data.batch_size=2", "data.val_tokens=200", "trainer=cpu", "trainer.max_steps=30",
]  # fmt: skip


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text")
    words = [*SMALL, f"data.paths=['{text}']", f"data.cache_dir='{tmp_path / 'cache'}'"]
    assert cli.main(["validate", "--json", "--folder", str(tmp_path / "made"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    said = {stage["name"]: stage["said"] for stage in found["stages"]}
    assert list(said) == ["prepare", "kill", "resume", "evaluate", "export", "verify", "generate"]
    assert int(said["kill"].split("step ")[1].split(",")[0]) > EVERY
    assert "with the same losses to the last digit" in said["resume"]
    assert "after 30 steps" in said["evaluate"]


def test_a_loss_that_changes_is_noticed(tmp_path: Path) -> None:
    validation = Validation(tmp_path, before={11: "2.5", 12: "2.4"})
    validation._compare({11: "2.5"})
    with pytest.raises(StageError, match=r"step 12 had the loss 2\.4 before the kill and 2\.41 after it"):
        validation._compare({11: "2.5", 12: "2.41"})


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty"):
        main(["--folder", str(tmp_path)])
    with pytest.raises(UserError, match=r"file cannot be used: it is not a folder"):
        main(["--folder", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"file/below cannot be used: it is not a folder"):
        main(["--folder", str(tmp_path / "file" / "below")])
    with pytest.raises(UserError, match=r"/proc/.* cannot be used: \w+"):  # nobody can write there
        main(["--folder", "/proc/nanochat"])
    with pytest.raises(UserError, match="--kills=0"):
        main(["--kills", "0"])
    with pytest.raises(UserError, match=r"data\.batch_sze"):
        main(["data.batch_sze=2"])
