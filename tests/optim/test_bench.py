"""`nanochat bench optim`: its bytes, counted on one layer, are those of the whole network."""

import json

import pytest
import torch

from nanochat.bench import optim as bench
from nanochat.errors import UserError
from nanochat.model import GPT
from nanochat.optim import build
from tests.optim.helpers import config


def whole(name, network):
    optimizer = build([(f"gpt.{n}", p) for n, p in network.named_parameters()], **config(name))
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    return optimizer


def test_table(capsys, monkeypatch):
    small = bench.model_config(bench.compose(["model=tiny", "model.vocab_size=512", "tokenizer.vocab_size=512"]))
    monkeypatch.setattr(bench, "model_config", lambda cfg: small)
    figures = bench.run(json=True, presets=("tiny",), optimizers=("muon8bit", "galore"), repeats=1, peak=False)
    assert json.loads(capsys.readouterr().out)["models"] == figures["models"]
    model = figures["models"]["tiny"]
    assert set(model["optimizers"]) == {"adamw", "muon", "muon8bit", "galore"}
    network = GPT(small)
    assert model["parameters"] == sum(p.numel() for p in network.parameters())
    for name in ("adamw", "muon8bit", "galore"):
        entry, optimizer = model["optimizers"][name], whole(name, network)
        assert entry["bytes_per_parameter"] * model["parameters"] == pytest.approx(optimizer.state_bytes())
        assert entry["matrix_bytes_per_parameter"] * model["matrices"] == pytest.approx(
            optimizer.state_bytes("matrices")
        )
        assert entry["seconds"] > 0
    assert model["optimizers"]["adamw"]["to_adamw"] == 1.0
    assert model["optimizers"]["muon8bit"]["matrix_bytes_per_parameter"] <= 1.01


def test_unknown_names():
    with pytest.raises(UserError, match="no 'd21'; did you mean 'd20'"):
        bench.main(["--presets", "tiny,d21"])
    with pytest.raises(UserError, match="no 'mun'; did you mean 'muon'"):
        bench.main(["--optim", "mun"])
