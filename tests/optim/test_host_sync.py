"""No rule reads a tensor's value on the host during a step: on a GPU that would wait for all work queued so far."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.helpers import NAMES, Net, batch, make, train

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "repeat_interleave"}


class HostReads(TorchDispatchMode):
    """Names of the operators that read a tensor's value on the host, or whose result's shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masked = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for indices in args
            if isinstance(indices, list | tuple)
            for index in indices
        )
        if name in READS or masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads():
    mode = HostReads()
    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):  # no operators
            method = getattr(torch.Tensor, name)
            seen = lambda self, *rest, name=name, method=method: mode.found.append(name) or method(self, *rest)  # noqa: E731
            stack.enter_context(mock.patch.object(torch.Tensor, name, seen))
        stack.enter_context(mode)
        yield mode.found


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
        with host_reads() as found:
            read()
        assert found


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
    with host_reads() as found:
        optimizer.step()
    assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_looks_after_its_states_reads_once(name):
    optimizer = prepared(name)
    quantized = any(optimizer.rules[group["rule"]].quantized for group in optimizer.param_groups)
    with host_reads() as found:
        optimizer.step()
    assert len(found) == quantized
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("muon")])
def test_stacked_matrices_read_nothing(name, monkeypatch):
    monkeypatch.setattr("nanochat.optim.rules.muon.buckets", lambda parameters: _by_shape(parameters))
    optimizer = prepared(name)
    optimizer.skip_next = False
    with host_reads() as found:
        optimizer.step()
    assert found == []


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
