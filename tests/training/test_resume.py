"""Which checkpoints a run may be resumed from, and what is said of the others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nanochat.errors import UserError
from nanochat.run import settle, train
from nanochat.training.resume import check_resume, checkpoint_to_resume, differences
from tests.runs import configure, read_state, same

RUN = ["trainer.max_steps=2", "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def saved(place: Path) -> Path:
    train(configure(place, RUN), place / "run")
    return place / "run" / "checkpoints" / "last.ckpt"


def plain(place: Path, *overrides: str) -> dict[str, Any]:
    """The configuration as the run has it when it looks at the checkpoint."""
    cfg: Any = OmegaConf.to_container(configure(place, [*RUN, *overrides]), resolve=True)
    cfg["model"]["vocab_size"] = 257
    return settle(cfg)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.dim=128", "model.dim 64 -> 128"),
        ("model.ternary=false", "model.ternary true -> false"),
        ("seed=1", "with: seed 0 -> 1"),
        ("data.batch_size=4", "data.batch_size 2 -> 4"),
        ("data.seq_len=16", "data.seq_len 32 -> 16"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches 1 -> 2"),
        ("optim=adamw", "optim.groups."),
        ("loss.z_loss=0.1", "loss.z_loss 0.0 -> 0.1"),
        ("tokenizer=bpe", "tokenizer._target_"),
        ("+mtp=on", "mtp.weight null -> "),
    ],
)
def test_changes_that_are_refused(place: Path, saved: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_resume(saved, plain(place, override))
    assert line in str(caught.value)


def test_fields_that_the_version_before_did_not_have(
    place: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are compared as what they mean there: no value embeddings, scales as float16 has them."""
    content = torch.load(saved, weights_only=True)
    model = content["hyper_parameters"]["cfg"]["model"]
    for name in ("value_embeddings", "value_gate", "scale_format", "int8"):
        del model[name]
    torch.save(content, tmp_path / "old.ckpt")
    with caplog.at_level(logging.WARNING):
        check_resume(tmp_path / "old.ckpt", plain(place, "model.scale_format=float16", "model.int8=false"))
    assert not caplog.text
    with pytest.raises(UserError, match=r"model\.scale_format float16 -> bfloat16"):
        check_resume(tmp_path / "old.ckpt", plain(place, "model.scale_format=bfloat16"))


def test_another_machine_s_int8_units_warn(place: Path, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = plain(place)
    settings["model"]["int8"] = not settings["model"]["int8"]
    with caplog.at_level(logging.WARNING):
        check_resume(saved, settings)
    assert "not bit for bit, since these have changed: model.int8 " in caplog.text


def test_all_changes_are_listed(place: Path, saved: Path) -> None:
    with pytest.raises(UserError, match=r"seed 0 -> 1; .*model\.n_layers 2 -> 3"):
        check_resume(saved, plain(place, "seed=1", "model.n_layers=3"))


@pytest.mark.parametrize(
    "override",
    [
        "logger=none", "trainer.max_time=00:01:00:00", "data.val_tokens=100",
        "trainer.val_check_interval=7", "trainer.limit_val_batches=2", "task_name=other", "+mtp=off", "tags=[a]",
        "activation_checkpointing=block", "offload_optimizer=true",
    ],
)  # fmt: skip
def test_changes_that_are_fine(place: Path, saved: Path, override: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_resume(saved, plain(place, override))
    assert not caplog.text


def test_another_length_warns_since_every_rate_depends_on_it(
    place: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_resume(saved, plain(place, "trainer.max_steps=10"))
    assert "trainer.max_steps 2 -> 10" in caplog.text


def test_what_changes_the_bits_warns(place: Path, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            check_resume(saved, plain(place, "compile=true", "optim.lr=0.5"))
    finally:
        torch.set_num_threads(threads)
    assert f"threads {threads} -> {threads + 1}" in caplog.text
    assert "compile false -> true" in caplog.text
    assert "optim.lr 0.02 -> 0.5" in caplog.text


def test_other_text(place: Path, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("something else entirely\n" * 500)
    settings = [*RUN, f"data.paths=['{tmp_path}']", f"ckpt_path='{saved}'", "trainer.max_steps=3"]
    with pytest.raises(UserError, match="data"):
        train(configure(place, settings), tmp_path / "run")


def test_damaged_foreign_and_newer_files(place: Path, saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 10, 5_000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated, damaged, or not"):
            check_resume(tmp_path / "cut.ckpt", plain(place))
    content = torch.load(saved, weights_only=True)
    for change, message in (
        ({"nanochat_format": 2}, "format 2"),
        ({"state_dict": None}, "no state_dict"),
        ({"nanochat_run": None}, "cannot be resumed"),
        ({"hyper_parameters": {}}, "cannot be resumed"),
    ):
        torch.save({**content, **change}, tmp_path / "changed.ckpt")
        with pytest.raises(UserError, match=message) as caught:
            check_resume(tmp_path / "changed.ckpt", plain(place))
        assert "\n" not in str(caught.value)


def test_which_checkpoint(place: Path, saved: Path, tmp_path: Path) -> None:
    run = saved.parent.parent
    assert checkpoint_to_resume(run, "last") == checkpoint_to_resume(run, "auto") == saved
    assert checkpoint_to_resume(tmp_path, str(saved)) == saved
    assert checkpoint_to_resume(tmp_path, None) is None
    assert checkpoint_to_resume(tmp_path, "auto") is None
    with pytest.raises(UserError, match=r"ckpt_path=last.*ckpt_path=auto"):
        checkpoint_to_resume(tmp_path, "last")
    with pytest.raises(UserError, match="no such file"):
        checkpoint_to_resume(tmp_path, tmp_path / "gone.ckpt")
    with pytest.raises(UserError, match="already holds a run"):
        checkpoint_to_resume(run, None)


def test_a_finished_run_is_only_validated_again(place: Path, saved: Path) -> None:
    before = saved.stat().st_mtime_ns
    rows = (place / "run" / "metrics.csv").read_text()
    metrics = train(configure(place, [*RUN, "ckpt_path=last"]), place / "run")
    assert metrics["val/bpb"] > 0
    assert (place / "run" / "metrics.csv").read_text() == rows
    assert saved.stat().st_mtime_ns == before


def test_differences() -> None:
    assert differences("a", {"b": 1, "c": (1, 2)}, {"b": 1, "c": [1, 2]}) == []
    assert differences("a", {"b": None}, {}) == []
    assert differences("a", {"b": {"x": 1}}, {"b": 2}) == ["a.b.x 1 -> null"]


def test_checkpointing_changes_no_bit_of_a_run(place: Path) -> None:
    run = [*RUN, "+mtp=on", "+collider=on", "collider.warmup_steps=0", "model.value_embeddings=1", "+mhc=on"]
    for mode in ("none", "block"):
        train(configure(place, [*run, f"activation_checkpointing={mode}"]), place / f"recompute-{mode}")
    same(read_state(place / "recompute-none"), read_state(place / "recompute-block"))
