"""What a run says before its first step."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.model import GPTConfig
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.reports.header import describe_techniques
from nanochat.run import train
from nanochat.training.callbacks import header
from nanochat.training.callbacks.collider import Collider
from nanochat.training.callbacks.header import Header
from nanochat.training.module import NanoChatModule
from tests.runs import configure
from tests.training.callbacks.short_runs import BARE


def test_it_comes_before_the_first_step(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original, before = NanoChatModule.training_step, []

    def training_step(self: NanoChatModule, *args: Any) -> Any:
        before.append(caplog.text)
        return original(self, *args)

    monkeypatch.setattr(NanoChatModule, "training_step", training_step)
    folder, settings = place / "header", [*BARE, "trainer.accumulate_grad_batches=2", "optim=muon"]
    with caplog.at_level(logging.INFO):
        train(configure(place, [*settings, "trainer.max_steps=2"]), folder)
        for line in (
            "model      run: ternary, 98,816 parameters, width 64, 2 layers",
            "data       text: ",
            "optimizer  adamw + muon, lr 0.02",
            "precision  32-true",
            "device     cpu",
            "steps      2 of 128 tokens",
            "time       estimated after the first steps",
        ):
            assert f"\n{line}" in before[0]
        assert str(folder) in before[0] or f"folder     {header.shown(folder)}" in before[0]
        caplog.clear()
        train(configure(place, [*settings, "trainer.max_steps=3", "ckpt_path=last"]), folder)
        assert "steps      3 of 128 tokens; 2 are done" in caplog.text
        caplog.clear()
        train(configure(place, [*settings, "trainer.max_steps=3", "ckpt_path=last"]), folder)
        assert "About to train" not in caplog.text  # nothing is left to do


def test_the_estimate_is_of_steps_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of 0.5 s after a slow first one; a validation of 100 s."""
    now = 0.0
    monkeypatch.setattr(header.time, "monotonic", lambda: now)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=-1)
    module: Any = None
    callback = Header({}, None)
    callback._shown = True
    callback.on_train_start(trainer, module)
    trainer.max_steps = 100
    with caplog.at_level(logging.INFO):
        for step in range(1, 20):
            now += 20.0 if step == 1 else 0.5
            callback.on_step_end(trainer, module, step)
            if step == 4:
                callback.on_validation_start(trainer, module)
                now += 100.0
    # timed from step 5 to step 9: 91 steps of 0.5 s are left, 45.5 s
    assert [record.message for record in caplog.records] == [
        "about 0:46 for the 91 steps left, without validations and saves"
    ]
    caplog.clear()
    other, trainer.max_steps = Header({}, None), 10
    with caplog.at_level(logging.INFO):
        for step in range(7, 10):
            now += 1.0
            other.on_step_end(trainer, module, step)
    assert caplog.messages == ["about 0:01 for the 1 step left, without validations and saves"]


@pytest.mark.parametrize("by_user", [True, False])
def test_a_warm_up_longer_than_the_time(
    by_user: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(header.time, "monotonic", lambda: now)
    monkeypatch.setattr(header, "set_by_user", lambda key: by_user)
    limit = SimpleNamespace(seconds=100.0, left=lambda: 100.0 - now)
    monkeypatch.setattr(header, "find_limit", lambda trainer: limit)
    trainer: Any = SimpleNamespace(global_step=0, max_steps=-1)
    module: Any = None
    callback = Header({"schedule": {"horizon": "time", "warmup_steps": 30}}, None)
    callback._first = 0
    for step in range(1, 10):
        now += 0.5
        callback.on_step_end(trainer, module, step)
    text = "schedule.warmup_steps=30 is cut to a tenth of trainer.max_time, about 20 steps."
    assert (text in caplog.messages) == by_user


def test_it_names_the_techniques() -> None:
    config = GPTConfig(vocab_size=8, dim=16, n_heads=1, n_kv_heads=1, ffn_dim=16, n_layers=1)
    model = {"value_embeddings": 1, "value_gate": "static", "streams": 2, "stream_maps": "static", "int8": True}
    own = {"_target_": "somebody.Elses"}
    target = "nanochat.training.callbacks.collider.Collider"
    cfg = {"model": model, "optim": {"_target_": "x"}, "collider": {"_target_": target}, "demo": own, "mhc": {}}
    module: Any = SimpleNamespace(objectives={"mtp": MultiTokenPrediction(config, kind="parallel", tokens=2)})
    trainer: Any = SimpleNamespace(callbacks=[Header({}, None), Collider(sparsity=0.5)])
    assert describe_techniques(cfg, trainer, module) == (
        "int8 forward, 1 table of value embeddings (static gate), 2 residual streams (static maps), "
        "MTP (parallel, 2 further tokens), Collider (random, 50% dropped), demo"
    )
    off: Any = SimpleNamespace(objectives={"mtp": MultiTokenPrediction(config, weight=0)})
    trainer.callbacks = [Collider(sparsity=0)]
    narrow = {"model": {"int8": True, "int8_backward": True}, "weights": "bfloat16-master"}
    expected = "weights in bfloat16 with float32 copies, int8 forward and backward"
    assert describe_techniques(narrow, trainer, off) == expected
    assert describe_techniques({"model": {"streams": 1, "int8": "auto"}}, trainer, off) == ""
