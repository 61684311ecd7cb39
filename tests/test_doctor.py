"""The doctor trains on the path of a run, and says so when that path is broken."""

import json

import pytest
import torch

import nanochat.cli
from nanochat import device, doctor
from nanochat.model import GPT
from nanochat.training.module import NanoChatModule

SHORT = ["--json", "--seconds", "0.01"]


def found(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_sound_machine(capsys, monkeypatch):
    steps = []
    known = NanoChatModule.optimizer_step
    monkeypatch.setattr(NanoChatModule, "optimizer_step", lambda self, *a, **k: steps.append(known(self, *a, **k)))
    assert doctor.main(SHORT) == 0
    said = found(capsys)
    assert said["ok"] is True
    assert len(steps) == said["smoke test"]["steps"] == doctor.LEAST
    assert said["smoke test"]["last_loss"] < said["smoke test"]["first_loss"]
    assert said["smoke test"]["tokens_per_second"] > 0


@pytest.mark.parametrize("units", [True, False])
def test_the_probe_is_printed(units, capsys, monkeypatch):
    """With the speeds of a machine that has units for bfloat16 and int8, or has them not."""
    seconds = {torch.float32: 0.01, torch.bfloat16: 0.004, torch.int8: 0.002}
    monkeypatch.setattr(device, "product_seconds", lambda dtype, kind="cpu": seconds[dtype])
    monkeypatch.setattr(device, "has_units", lambda names: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for cached in (device._bf16_pays, device._int8_pays):
        cached.cache_clear()
        monkeypatch.setattr(device, cached.__name__, cached.__wrapped__)
    said = doctor.products()
    gops = {name: pytest.approx(2e-9 * device.PROBE_SIDE**3 / t, abs=0.06)
            for name, t in (("float32", 0.01), ("bfloat16", 0.004), ("int8", 0.002))}  # fmt: skip
    assert said == {"gops": gops, "bfloat16": units, "int8": units}
    used = "bfloat16 is used, int8 is used" if units else "bfloat16 is not used, int8 is not used"
    assert doctor.products_in_words(said) == f"float32 27 Gop/s, bfloat16 67 Gop/s, int8 134 Gop/s, {used}"
    monkeypatch.setattr(doctor, "smoke_test", lambda *a: {"first_loss": 2.0, "last_loss": 1.0, "steps": 20,
                        "first_step_seconds": 1.0, "tokens_per_second": 9.0})  # fmt: skip
    assert doctor.main([]) == 0
    assert "float32 27 Gop/s" in " ".join(capsys.readouterr().out.split())


def test_device_and_precision_are_those_of_a_run(capsys, monkeypatch):
    known, seen, trunk = doctor.smoke_config(), set(), GPT.trunk
    trainer = {**known["trainer"], "accelerator": "cpu", "precision": "bf16-mixed"}
    monkeypatch.setattr(doctor, "smoke_config", lambda: {**known, "trainer": trainer, "compile": False})

    def watched(self, *inputs):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return trunk(self, *inputs)

    monkeypatch.setattr(GPT, "trunk", watched)
    assert doctor.main(SHORT) == 0
    assert seen == {torch.bfloat16}
    assert found(capsys)["device"].endswith("bf16-mixed")


def test_a_path_that_breaks(capsys, monkeypatch):
    def step(self, batch, batch_idx):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(NanoChatModule, "training_step", step)
    assert doctor.main(SHORT) == 1
    said = found(capsys)
    assert said["ok"] is False
    assert said["smoke test"] == {"error": "FAILED: RuntimeError: no kernel image is available"}
    assert doctor.main(SHORT[1:]) == 1
    assert "no kernel image" in capsys.readouterr().out


def test_training_that_learns_nothing(capsys, monkeypatch):
    known = doctor.smoke_config()
    schedule = {"_target_": "nanochat.optim.Constant", "warmup_steps": 10**9}
    monkeypatch.setattr(doctor, "smoke_config", lambda: {**known, "schedule": schedule})
    assert doctor.main(SHORT[1:]) == 1
    assert "does NOT learn" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "soon"])
def test_seconds(seconds, capsys):
    assert nanochat.cli.main(["doctor", f"--seconds={seconds}"]) == 2
    assert capsys.readouterr().err == (
        f"error: nanochat doctor: argument --seconds: {seconds} must be a number of seconds above 0.\n"
    )
