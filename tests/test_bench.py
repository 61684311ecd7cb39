"""The benches run, and their figures have the meaning that their names promise."""

import json

import pytest

from nanochat import doctor, params
from nanochat.bench import cli, loss, step
from nanochat.errors import UserError


def test_loss(capsys):
    assert loss.main(["--tokens", "1024", "--dim", "32", "--vocabulary", "2000", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    arms = figures["arms"]
    peaks = arms["chunked"]["peak_extra_mb"] / arms["dense"]["peak_extra_mb"]
    assert figures["memory_ratio"] == pytest.approx(peaks, rel=1e-12)  # of bytes and of megabytes: rounding apart
    assert figures["arms"]["dense"]["time_ratio"] == 1.0


def test_step(capsys):
    assert step.main(["--presets", "tiny", "--repeats", "1", "--no-lightning", "--json", "model.n_layers=1"]) == 0
    entry = json.loads(capsys.readouterr().out)["presets"]["tiny"]
    assert entry["tokens_per_second"] == pytest.approx(entry["tokens_per_step"] / entry["step_seconds"])
    assert set(entry["share"]) == {"embedding", "attention", "feed-forward", "head + loss", "optimizer", "data"}


def test_lightning_s_share():
    assert 0.3 < step.bench_lightning("tiny", "adamw", batch=1, steps=2, rounds=1)["lightning_ratio"] < 30


def test_unknown_bench():
    with pytest.raises(UserError, match="did you mean 'step'"):
        cli.main(["stepp"])


def test_params(capsys):
    assert params.main(["--json", "model=d20"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == pytest.approx(17.98e6, rel=0.01)


def test_doctor(capsys):
    assert doctor.main(["--json", "--seconds", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
