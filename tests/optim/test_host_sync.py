"""No rule reads a tensor's value on the host during a step: on a GPU that would wait for all work queued so far."""

import pytest
import torch

from tests.host_reads import host_reads
from tests.optim.helpers import NAMES, Net, batch, make, train


def test_reads_are_seen():
    x = torch.ones(3)
    for read in (
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: float(x.sum()),
        lambda: x[x > 0],
        lambda: x.sum().tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: torch.nonzero(x),
        lambda: x.add(1.0, alpha=x.sum()),
        lambda: range(x.sum().int()),
    ):
        with host_reads() as reads:
            read()
        assert reads.found


def prepared(name):
    net = Net(dim=128, wide=256)
    optimizer = make(name, net)
    train(net, optimizer, 0, 2)  # GaLore's first step makes the projectors
    optimizer.set_progress(2, 100, lambda step, max_steps: 1.0)
    optimizer.zero_grad()
    net.loss(batch(2)).backward()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_known_gradients_reads_nothing(name):
    optimizer = prepared(name)
    optimizer.skip_next = False
    with host_reads() as reads:
        optimizer.step()
    assert reads.found == []


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_looks_after_its_states_reads_once(name):
    optimizer = prepared(name)
    quantized = any(optimizer.rules[group["rule"]].quantized for group in optimizer.param_groups)
    with host_reads() as reads:
        optimizer.step()
    assert len(reads.found) == quantized
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("muon")])
def test_stacked_matrices_read_nothing(name, monkeypatch):
    monkeypatch.setattr("nanochat.optim.rules.muon.buckets", lambda parameters: _by_shape(parameters))
    optimizer = prepared(name)
    optimizer.skip_next = False
    with host_reads() as reads:
        optimizer.step()
    assert reads.found == []


def _by_shape(parameters):
    shapes = {}
    for i, parameter in enumerate(parameters):
        shapes.setdefault(parameter.shape, []).append(i)
    return list(shapes.values())


def test_gradients_known_to_be_finite_are_not_looked_at(monkeypatch):
    optimizer = prepared("muon8bit")
    monkeypatch.setattr(optimizer, "gradients_fit", lambda groups: pytest.fail("looked"))
    optimizer.skip_next = False
    optimizer.step()
    assert optimizer.skip_next is None
