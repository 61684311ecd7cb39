"""`nanochat bench optim`: its bytes, counted on one layer, are those of the whole network."""

import json
import sys

import pytest
import torch

from nanochat.bench import optim as bench
from nanochat.bench.measure import peak_extra_bytes
from nanochat.errors import UserError
from nanochat.model import GPT
from nanochat.optim import build
from nanochat.optim.rules import galore
from tests.optim.helpers import config


def whole(name, network):
    optimizer = build([(f"gpt.{n}", p) for n, p in network.named_parameters()], **config(name))
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    return optimizer


def test_table(capsys, monkeypatch):
    small = bench.network("tiny", vocab_size=512)
    monkeypatch.setattr(bench, "network", lambda preset: small)
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


@pytest.mark.parametrize("name", ["muon8bit", "galore-muon8bit"])
def test_one_layer_stands_for_all(name):
    counted = []
    for whole in (False, True):
        shapes = bench.Shapes("tiny", whole)
        optimizer = shapes.optimizer(name)
        optimizer.step()
        counted.append((shapes.count(optimizer), sum(p.numel() for _, p in shapes.parameters)))
    (one, built_one), (all_, built_all) = counted
    assert one == all_
    assert built_one < built_all == all_["parameters"]


def test_a_peak_is_that_of_a_refresh(monkeypatch):
    projectors = []
    known = galore.randomized_projector
    monkeypatch.setattr(galore, "randomized_projector", lambda *a: projectors.append(1) or known(*a))
    monkeypatch.setattr(bench, "peak_extra_bytes", lambda step: (projectors.clear(), step()))
    bench._peak("tiny", "galore")
    assert len(projectors) == 7  # matrices of a layer


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_freed_memory_does_not_hide_a_peak():
    def work():
        return (torch.randn(400, 1000) @ torch.randn(1000, 400)).sum()

    kept = [torch.randn(250_000) for _ in range(20)]
    work()
    last = torch.randn(100)  # keeps the heap from shrinking by itself
    kept.clear()
    assert peak_extra_bytes(work) > 0.9 * (2 * 400 * 1000 + 400 * 400) * 4
    assert last.numel() == 100


def test_unknown_names():
    with pytest.raises(UserError, match="no 'd21'; did you mean 'd20'"):
        bench.main(["--presets", "tiny,d21"])
    with pytest.raises(UserError, match="no 'mun'; did you mean 'muon'"):
        bench.main(["--optim", "mun"])
