"""`nanochat params` says before a run what the run will say of itself."""

import json
import sys

import pytest

import nanochat.cli
from nanochat import params
from nanochat.bench.measure import peak_extra_bytes
from nanochat.config.compose import compose
from nanochat.config.vocabulary import plan_vocabulary
from nanochat.run import settle, train
from tests.runs import configure, read_metrics, words


def figures(capsys, *overrides):
    capsys.readouterr()
    assert params.main(["--json", *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_presets_size(capsys):
    found = figures(capsys, "model=d20")
    assert found["parameters"] == pytest.approx(17.98e6, rel=0.01)
    assert set(found["parts"]) == {"embedding", "attention", "feed-forward", "norms"}
    assert set(found["file_parts"]) == {*found["parts"], "head"}  # the tied table, without the folded norm
    assert sum(found["optimizer_parts"].values()) == found["optimizer_bytes"]
    assert found["training_bytes"] == 8 * found["parameters"] + found["optimizer_bytes"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=muon8bit", "+mtp=on"],
        ["optim=galore8bit", "+mhc=on"],
        ["optim=adamw"],
        ["optim=lion", "weights=bfloat16-master"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_the_optimizer_s_bytes_are_those_of_a_run(overrides, capsys, tmp_path):
    # matrices large enough for 8-bit states
    overrides = [*overrides, "model.dim=128", "model.ffn_dim=256"]
    run = ["trainer.max_steps=2", "~callbacks.sampler", "~callbacks.loss_plot", "~callbacks.progress"]
    train(configure(tmp_path, [*overrides, *run]), tmp_path / "run")
    measured = float(read_metrics(tmp_path / "run")[-2]["optim/bytes"])
    found = figures(capsys, *words(tmp_path), *overrides)
    assert found["optimizer_bytes"] == measured
    if "+mtp=on" in overrides:
        assert found["parts"]["mtp heads"] > 2 * 128 * 128
        assert found["optimizer_parts"]["mtp heads"] > found["parts"]["mtp heads"]  # about a byte for each


def test_optimizer_and_heads_count(capsys):
    plain, mtp = (figures(capsys, "model=tiny", "optim=muon8bit", *more) for more in ([], ["+mtp=on"]))
    assert mtp["parameters"] - plain["parameters"] == mtp["parts"]["mtp heads"]
    assert mtp["file_bytes"] > plain["file_bytes"]
    wide = figures(capsys, "model=tiny", "optim=adamw")
    assert wide["optimizer_bytes"] > 8 * wide["parameters"] > 3 * plain["optimizer_bytes"]


def test_weights_in_bfloat16_count(capsys):
    wide, small, copies = (
        figures(capsys, "model=tiny", "model.n_layers=1", "optim=adamw", f"weights={kind}")
        for kind in ("float32", "bfloat16", "bfloat16-master")
    )
    assert small["parameters"] == wide["parameters"]
    weights, states = wide["training_bytes"] - wide["optimizer_bytes"], wide["optimizer_bytes"]
    assert weights / 2 < small["training_bytes"] - small["optimizer_bytes"] < 0.51 * weights
    assert small["optimizer_bytes"] == states
    assert 1.49 * states < copies["optimizer_bytes"] < 1.5 * states


def test_only_sequential_heads_are_shipped(capsys):
    off, on = (figures(capsys, "model=tiny", *more) for more in ([], ["+mtp=on", "mtp.kind=parallel"]))
    assert on["parts"]["mtp heads"] > 0
    assert on["file_bytes"] == off["file_bytes"]


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["tokenizer=gpt2"], 50257),
        (["tokenizer=byte"], 257),
        (["tokenizer.vocab_size=1000"], 1000),
        (["data=synthetic"], 257),
        (["data=synthetic", "data.vocab_size=99"], 99),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_vocabulary_of_auto_is_the_tokenizer_s(overrides, size, capsys):
    found = figures(capsys, "model.vocab_size=auto", *overrides)
    assert found["parts"]["embedding"] == size * 256


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_seven_billion_parameters_take_no_memory():
    cfg = plan_vocabulary(settle(compose(["experiment=large-7b"])))
    parts = {}
    assert peak_extra_bytes(lambda: parts.update(params.count(cfg)[0])) < 200e6
    assert sum(part.parameters for part in parts.values()) > 6e9
    assert sum(part.optimizer_bytes for part in parts.values()) > 1e9


def test_mistakes(capsys):
    assert nanochat.cli.main(["params", "--jsn"]) == 2
    assert nanochat.cli.main(["params", "model=d21"]) == 2
    assert "Traceback" not in capsys.readouterr().err
