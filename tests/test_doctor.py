"""The doctor trains on the path of a run, and says so when that path is broken."""

import json

import pytest
import torch

import nanochat.cli
from nanochat import doctor
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
