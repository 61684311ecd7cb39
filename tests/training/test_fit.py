"""What is said of a run that does not fit, and the micro-batch that `auto` takes."""

import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nanochat.config.check import check
from nanochat.errors import UserError
from nanochat.run import settle, train
from nanochat.training import fit, memory
from tests.runs import configure, read_state

RUN = ["trainer.max_steps=2", "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress"]


@pytest.fixture(autouse=True)
def real_steps(monkeypatch):
    """Predictions from real steps: of networks this small they take less time, and count the same."""
    monkeypatch.setattr(fit, "predict", predict)


def predict(cfg):
    return memory.predict(cfg, fake=False)


def settled(place: Path, *overrides: str):
    cfg = OmegaConf.to_container(configure(place, overrides), resolve=True)
    cfg["model"]["vocab_size"] = 257  # type: ignore[index]
    return settle(cfg)  # type: ignore[arg-type]


def test_what_fits_is_not_rehearsed(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "predict", lambda cfg: pytest.fail("rehearsed"))
    assert fit.check_fits(settled(tmp_path), free=2**33) is None


def test_sizes_alone_are_generous(tmp_path):
    for overrides in ([], ["+mhc=on", "mhc.streams=4", "mhc.maps=dynamic"], ["+mtp=on", "mtp.tokens=3", "optim=adamw"]):
        cfg = settled(tmp_path, *overrides, "data.batch_size=16")
        assert fit.generous_bytes(cfg) - 4 * 2**26 > predict(cfg).peak


def test_a_run_that_hardly_fits_is_told_what_saves_memory(tmp_path):
    cfg = settled(tmp_path, "data.batch_size=16", "optim=muon")
    peak = predict(cfg).peak
    assert fit.check_fits(cfg, free=peak) is None
    text = fit.check_fits(cfg, free=peak - 1)
    assert text is not None
    for words in ("predicted to take", "activation_checkpointing=block saves", "data.batch_size=1 trainer.accumulate",
                  "8-bit optimizer"):  # fmt: skip
        assert words in text
    assert "8-bit" not in str(fit.check_fits(settled(tmp_path, "data.batch_size=16", "optim=muon8bit"), free=peak // 2))


def test_what_cannot_fit_is_refused(tmp_path):
    cfg = settled(tmp_path)
    with pytest.raises(UserError, match="it cannot fit"):
        fit.check_fits(cfg, free=predict(cfg).fixed - 1)


def test_what_is_offloaded_needs_room_too(tmp_path, monkeypatch):
    for module in ("optim.offload", "optim.optimizer", "training.fit"):
        monkeypatch.setattr(f"nanochat.{module}.leaves", lambda device: True)
    monkeypatch.setattr("nanochat.optim.offload.SMALLEST", 4096)
    cfg = settled(tmp_path, "optim=adamw")
    there = predict({**cfg, "offload_optimizer": True})
    assert "offload_optimizer=true saves 0." in str(fit.check_fits(cfg, free=there.peak))
    monkeypatch.setattr(fit, "free_bytes", lambda device: there.offloaded)
    assert fit.check_fits({**cfg, "offload_optimizer": True}, free=there.peak) is None
    monkeypatch.setattr(fit, "free_bytes", lambda device: there.offloaded - 1)
    for free in (there.peak, 2**40):  # a GPU with room for everything, too
        with pytest.raises(UserError, match="the machine's memory"):
            fit.check_fits({**cfg, "offload_optimizer": True}, free=free)


def test_a_cpu_has_nowhere_to_offload_to(tmp_path, caplog):
    train(configure(tmp_path, [*RUN, "offload_optimizer=true"]), tmp_path / "run")
    assert "offload_optimizer=true changes nothing on cpu" in caplog.text


def test_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="cannot fit"):
        train(configure(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_auto_takes_the_largest_micro_batch_that_fits(tmp_path):
    cfg = settled(tmp_path, "data.batch_size=6", "trainer.accumulate_grad_batches=2")
    peaks = {size: predict(fit.with_batch(cfg, size, 12)).peak for size in (1, 2, 3, 4, 6, 12)}
    for size, peak in peaks.items():
        found = fit.choose_batch(cfg, tmp_path, free=int(peak / fit.USABLE) + 1)
        assert found["data"]["batch_size"] == size
        assert found["trainer"]["accumulate_grad_batches"] == 12 // size
    assert fit.choose_batch(cfg, tmp_path, free=1)["data"]["batch_size"] == 1


def test_a_run_keeps_the_batch_that_it_has_found(tmp_path, monkeypatch, caplog):
    """auto is saved as numbers, and a resume takes these, whatever memory there is then."""
    cfg = configure(tmp_path, [*RUN, "data.batch_size=auto"])
    checked = check(cfg)
    assert checked.auto_batch
    assert checked.values["data"]["batch_size"] == 8  # of the data's option
    with caplog.at_level(logging.INFO):
        train(checked, tmp_path / "run")
    assert "data.batch_size=auto is 8" in caplog.text
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (saved.data.batch_size, saved.trainer.accumulate_grad_batches) == (8, 1)
    # little memory now, for which a new run would take 1 x 8
    least = predict(fit.with_batch({**checked.values, "model": {**checked.values["model"], "vocab_size": 257}}, 1, 8))
    monkeypatch.setattr(fit, "free_bytes", lambda device: least.peak)
    again = [*RUN, "data.batch_size=auto", "ckpt_path=last", "trainer.max_steps=4"]
    train(configure(tmp_path, again), tmp_path / "run")
    assert read_state(tmp_path / "run")["global_step"] == 4


@pytest.mark.parametrize(("limit", "expected"), [("5000000\n", [4_200_000]), ("max\n", [])])
def test_limits_of_a_control_group(limit, expected, tmp_path):
    group = tmp_path / "sys" / "job"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 800000\ninactive_file 200000\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/job\n")
    assert list(fit._cgroup_bytes(tmp_path / "sys", own)) == expected


def test_free_memory_of_this_machine():
    free = fit.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**46


def test_ranks_on_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(fit, "free_bytes", lambda device: 8 * 2**30)
    assert fit.own_free_bytes({"trainer": {"accelerator": "cpu", "devices": 1}}) == 8 * 2**30
    assert fit.own_free_bytes({"trainer": {"accelerator": "cpu", "devices": 4}}) == 2 * 2**30
