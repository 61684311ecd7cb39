import time

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.optim.rules.galore import randomized_projector
from tests.optim.helpers import NAMES, Net, batch, make, only, reloaded, single, train


def trained_gradients(seed=0):
    """Gradients of the small network's matrices after some training, each (short, long)."""
    net = Net(vocab=256, dim=96, wide=256)
    train(net, make("adamw", net), 0, 40)
    net.zero_grad()
    for i in range(8):
        net.loss(batch(100 + i, vocab=256)).backward()
    return [b.grad if b.shape[0] <= b.shape[1] else b.grad.mT for b in net.parameters() if b.ndim == 2]


@pytest.mark.parametrize("power_iterations", [1, 2])
def test_projector_keeps_the_energy_of_the_exact_one(power_iterations):
    for gradient in trained_gradients():
        for rank in (4, 24):
            projector = randomized_projector(gradient, rank, 8, power_iterations, torch.Generator().manual_seed(1))
            assert projector.shape == (gradient.shape[0], rank)
            torch.testing.assert_close(projector.mT @ projector, torch.eye(rank), rtol=0, atol=1e-5)
            best = torch.linalg.svdvals(gradient.double())[:rank].square().sum()
            found = (projector.double().mT @ gradient.double()).square().sum()
            assert 0.97 * best <= found <= best * (1 + 1e-6)


def test_projector_is_much_faster_than_an_svd():
    gradient = torch.randn(384, 1088)
    times = []
    for method in (
        lambda: torch.linalg.svd(gradient, full_matrices=False),
        lambda: randomized_projector(gradient, 48, 8, 1, torch.Generator().manual_seed(1)),
    ):
        method()
        best = 1e9
        for _ in range(3):
            start = time.thread_time()
            method()
            best = min(best, time.thread_time() - start)
        times.append(best)
    assert times[1] < times[0] / 5


@pytest.mark.parametrize("rank", ["full", 24])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_is_adamw(rank, shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(20, *shape)
    galore = single(start.clone(), "galore", 0.02, weight_decay=0.1, rank=rank, scale=0.25, betas=(0.9, 0.95))
    parameter = torch.nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([parameter], lr=0.005, betas=(0.9, 0.95), weight_decay=0.4)
    for gradient in gradients:
        only(galore).grad, parameter.grad = gradient.clone(), gradient.clone()
        galore.step()
        adamw.step()
    torch.testing.assert_close(only(galore), parameter, rtol=0, atol=1e-5)


def by_hand(weight, gradients, projectors, lr, scale, beta1, beta2, eps, period):
    """GaLore with given projectors in float64 loops: refresh k uses projectors[k]."""
    weight, moment1, moment2, old = weight.astype(np.float64), 0.0, 0.0, None
    tall = weight.shape[0] > weight.shape[1]
    for t, gradient in enumerate(gradients.astype(np.float64)):
        p = projectors[t // period].astype(np.float64)
        g = gradient.T if tall else gradient
        if old is not None and old is not p and t % period == 0:
            turn = p.T @ old
            moment1, moment2 = turn @ moment1, (turn**2) @ moment2
        old = p
        r = p.T @ g
        moment1 = beta1 * moment1 + (1 - beta1) * r
        moment2 = beta2 * moment2 + (1 - beta2) * r**2
        n = (moment1 / (1 - beta1 ** (t + 1))) / (np.sqrt(moment2 / (1 - beta2 ** (t + 1))) + eps)
        step = p @ n
        weight = weight - lr * scale * (step.T if tall else step)
    return weight


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_low_rank_is_its_definition_through_refreshes(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(9, *shape)
    options = {"rank": 5, "update_period": 3, "scale": 0.5, "betas": (0.8, 0.9), "eps": 1e-6}
    optimizer = single(start.clone(), "galore", 0.02, **options)
    projectors = []
    for t, gradient in enumerate(gradients):
        only(optimizer).grad = gradient.clone()
        optimizer.step()
        if t % 3 == 0:
            projectors.append(optimizer.state[only(optimizer)]["projector"].numpy().copy())
    expected = by_hand(start.numpy(), gradients.numpy(), projectors, 0.02, 0.5, 0.8, 0.9, 1e-6, 3)
    torch.testing.assert_close(only(optimizer).detach().double(), torch.from_numpy(expected), rtol=0, atol=2e-5)
    assert not np.array_equal(projectors[0], projectors[1])
    state = optimizer.state[only(optimizer)]
    assert state["exp_avg"].shape == ((5, 40) if shape[0] < shape[1] else (40, 5))


@pytest.mark.parametrize("rule", ["galore8bit", "galore-muon8bit"])
@pytest.mark.parametrize("shape", [(64, 320), (320, 64)])
def test_8_bit_variants_follow_32_bits_in_the_same_space(rule, shape, monkeypatch):
    """With every tensor counted as small nothing is quantised: the same rule in 32 bits."""

    def run():
        torch.manual_seed(4)
        start, target = torch.randn(shape), torch.randn(shape)
        optimizer = single(start.clone(), rule, 0.02, rank=32, update_period=7)
        for _ in range(20):
            only(optimizer).grad = (only(optimizer).detach() - target) + 0.1 * torch.randn(shape)
            optimizer.step()
        return start, only(optimizer).detach(), optimizer.state[only(optimizer)]

    start, quantized, state = run()
    assert any(v.dtype == torch.int8 for v in state.values() if isinstance(v, torch.Tensor))
    monkeypatch.setattr("nanochat.optim.rules.galore.SMALL", 10**9)
    monkeypatch.setattr("nanochat.optim.rules.muon.SMALL", 10**9)
    _, exact, state = run()
    assert not any(v.dtype == torch.int8 for v in state.values() if isinstance(v, torch.Tensor))
    assert 0 < (quantized - exact).norm() < 0.12 * (exact - start).norm()


def test_muon_in_the_space_is_orthogonal_in_the_whole():
    optimizer = single(torch.zeros(64, 256), "galore-muon8bit", 1.0, rank=16, adjust="original", ns_steps=5)
    only(optimizer).grad = torch.randn(64, 256)
    optimizer.step()
    values = torch.linalg.svdvals(only(optimizer).detach())
    assert ((values[:16] > 0.6) & (values[:16] < 1.2)).all()
    assert values[16:].max() < 1e-4


def test_refreshes_are_staggered():
    """After the first step, which needs them all, no step refreshes more than its share."""
    net = Net(layers=4)
    optimizer = make("galore", net, update_period=8, rank=4)
    matrices = next(g for g in optimizer.param_groups if g["name"] == "matrices")["params"]
    counts, last = [], None
    for step in range(25):
        train(net, optimizer, step, 1)
        projectors = [optimizer.state[p]["projector"].clone() for p in matrices]
        if last is not None:
            counts.append(sum(not torch.equal(a, b) for a, b in zip(last, projectors, strict=True)))
        last = projectors
    assert set(counts) == {1}, "8 matrices, a period of 8"


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("galore")])
def test_resume_through_refreshes_is_bit_equal(name):
    net = Net(dim=128, wide=256)
    optimizer = make(name, net, update_period=3)
    train(net, optimizer, 0, 5)
    again, loaded = reloaded(net, optimizer, lambda network: make(name, network, update_period=3))
    torch.rand(100)  # the global generator has no say
    assert train(net, optimizer, 5, 7) == train(again, loaded, 5, 7)


def test_bytes_of_the_matrices():
    """Rank d / 8: below 8-bit AdamW's 2 bytes an element; the projector counts."""
    gradient = torch.randn(256, 512)
    sizes = {}
    for rule, options in (("galore", {"rank": 0.125}), ("galore8bit", {"rank": 0.125}), ("adamw8bit", {})):
        optimizer = single(torch.zeros(256, 512), rule, 0.1, **options)
        only(optimizer).grad = gradient.clone()
        optimizer.step()
        sizes[rule] = optimizer.state_bytes() / gradient.numel()
    assert sizes["galore8bit"] < sizes["galore"] < sizes["adamw8bit"]
    assert sizes["galore"] == pytest.approx(4 * (2 * 32 * 512 + 32 * 256) / gradient.numel(), abs=1e-4)


BAD = [
    ("galore", {"rank": 0}, r"^optim\.rank=0"),
    ("galore", {"rank": 65}, r"rank=65 is larger than gpt\.blocks\.0\.up\.weight of shape \(128, 64\)"),
    ("galore", {"rank": 1.5}, r"rank=1\.5"),
    ("galore", {"rank": "half"}, "rank='half'"),
    ("galore8bit", {"rank": -4}, "rank=-4"),
    ("galore", {"update_period": 0}, "update_period=0"),
    ("galore-muon8bit", {"momentum": 1.0}, "momentum"),
    ("galore-muon8bit", {"rank": 65}, "rank=65"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD, ids=[f"{n}-{c}" for n, c, _ in BAD])
def test_bad_options(name, changes, message):
    with pytest.raises(UserError, match=message):
        make(name, Net(), **changes)


def test_another_rank_is_refused():
    net = Net()
    optimizer = make("galore", net, rank=8)
    train(net, optimizer, 0, 1)
    with pytest.raises(UserError, match=r"rank=8.*rank=4"):
        make("galore", net, rank=4).load_state_dict(optimizer.state_dict())
