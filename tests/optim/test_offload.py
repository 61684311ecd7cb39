"""Optimizer state in the CPU's memory: the same numbers, on the right device, saved and loaded either way."""

import copy
from collections import Counter

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.optim import offload
from nanochat.optim.offload import Away
from nanochat.optim.rounding import Rounding
from tests.optim.helpers import NAMES, Net, make, reloaded, train
from tests.runs import same


class Touched(TorchDispatchMode):
    """Which operations get to see some tensors, or views of them."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = {one.untyped_storage().data_ptr() for one in tensors}
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for one in tree_leaves((args, kwargs or {})):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() in self.storages:
                self.seen[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def everywhere(monkeypatch):
    """States leave a CPU, too: for another place in the same memory."""
    monkeypatch.setattr(offload, "SMALLEST", 4096)
    for module in ("nanochat.optim.offload", "nanochat.optim.optimizer"):
        monkeypatch.setattr(f"{module}.leaves", lambda device: True)


def offloading(name, net, weights="float32"):
    optimizer = make(name, net)
    optimizer.offload = True
    if weights != "float32":
        optimizer.rounding = Rounding(0, master=weights == "bfloat16-master")
    return optimizer


def away(optimizer):
    return [one for state in optimizer.state.values() if isinstance(state, Away) for one in state.away()]


def state_of(net, optimizer):
    return {"weights": net.state_dict(), "optimizer": optimizer.state_dict()}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_to_the_last_bit_and_across_a_save(name, everywhere):
    plain, gone = Net(dim=128, wide=256), Net(dim=128, wide=256)
    here, there = make(name, plain), offloading(name, gone)
    train(plain, here, 0, 2)
    train(gone, there, 0, 2)
    same(state_of(plain, here), state_of(gone, there))
    sizes = [one.numel() for one in away(there)]
    assert sizes
    assert min(sizes) >= 4096
    assert there.state_bytes() == here.state_bytes()
    # on and off at a resume
    back, moved = (
        reloaded(gone, there, lambda net: make(name, net)),
        reloaded(plain, here, lambda n: offloading(name, n)),
    )
    assert not away(back[1])
    assert [one.numel() for one in away(moved[1])] == sizes
    for net, optimizer in ((plain, here), back, moved):
        train(net, optimizer, 2, 2)
    # a rule, which computes on the GPU, sees copies alone
    with Touched(away(there)) as touched:
        train(gone, there, 2, 2)
    assert touched.seen == {"_to_copy": 2 * len(sizes), "copy_": 2 * len(sizes)}
    expected = state_of(plain, here)
    for net, optimizer in ((gone, there), back, moved):
        same(expected, state_of(net, optimizer))


@pytest.mark.parametrize("weights", ["bfloat16", "bfloat16-master"])
def test_weights_in_bfloat16(weights, everywhere):
    states = []
    for is_away in (False, True):
        net = Net(dim=128, wide=256)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
        optimizer = offloading("muon", net, weights)
        optimizer.offload = is_away
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        assert bool(away(optimizer)) == is_away
        states.append(state_of(net, optimizer))
    same(*states)


def test_states_visit_a_stack_at_a_time(everywhere, monkeypatch):
    net = Net(dim=128, wide=256, layers=3)
    optimizer = offloading("adamw", net)
    visits = []
    visiting = Away.visiting
    monkeypatch.setattr(Away, "visiting", lambda state: visits.append(state) or visiting(state))
    train(net, optimizer, 0, 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    large = [optimizer.state[p] for p in parameters if p.numel() >= 4096]
    assert [id(one) for one in visits] == [id(one) for one in large]


def test_it_is_page_locked_for_a_gpu(monkeypatch):
    asked = []

    def empty_like(like, **options):
        asked.append((options["device"], options.pop("pin_memory")))
        return torch.zeros_like(like)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    Away(torch.device("cuda"), {"momentum": torch.ones(offload.SMALLEST), "step": 1})
    Away(torch.device("cpu"), {"momentum": torch.ones(offload.SMALLEST), "step": 1})
    assert asked == [("cpu", True), ("cpu", False)]


def test_lightning_leaves_it_where_it_is(everywhere, monkeypatch):
    net = Net()
    optimizer = offloading("adamw", net)
    train(net, optimizer, 0, 1)
    before, values = away(optimizer), state_of(net, optimizer)
    monkeypatch.setattr("lightning.fabric.utilities.optimizer.move_data_to_device", lambda value, _: copy.copy(value))
    _optimizer_to_device(optimizer, torch.device("cpu"))
    assert [id(one) for one in away(optimizer)] == [id(one) for one in before]
    same(values, state_of(net, optimizer))


def test_what_is_set_stays_away():
    state = Away(
        torch.device("cpu"), {"step": 1, "momentum": torch.zeros(2 * offload.SMALLEST), "norm": torch.ones(())}
    )
    momentum = state["momentum"]
    visitor = state.visiting()
    assert visitor["momentum"].data_ptr() != momentum.data_ptr()
    visitor["momentum"].add_(1.0)
    assert momentum.sum() == 0
    state["momentum"], state["step"] = visitor["momentum"], 2
    assert state["momentum"] is momentum
    assert momentum.sum() == 2 * offload.SMALLEST
    assert state["step"] == 2
    assert visitor["norm"] is state["norm"]
    again = copy.deepcopy(state)
    same(dict(again), dict(state))
    assert isinstance(again, Away)
    state["momentum"] = torch.ones(3)
    assert state["momentum"].shape == (3,)
