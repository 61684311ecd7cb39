"""APOLLO against its definition in float64 loops."""

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.optim.rules.apollo import random_projector
from tests.optim.helpers import Net, make, only, reloaded, single, train


def by_hand(weight, gradients, projectors, lr, wd, scale, limit):
    """APOLLO in float64: rank 1 scales the whole tensor, a higher rank each channel of the longer side."""
    weight, moment1, moment2, last = weight.astype(np.float64), 0.0, 0.0, 0.0
    tall = weight.shape[0] > weight.shape[1]
    for t, gradient in enumerate(gradients.astype(np.float64)):
        g = gradient.T if tall else gradient
        r = projectors[t] @ g
        moment1 = 0.9 * moment1 + 0.1 * r
        moment2 = 0.999 * moment2 + 0.001 * r**2
        n = (moment1 / (1 - 0.9 ** (t + 1))) / (np.sqrt(moment2 / (1 - 0.999 ** (t + 1))) + 1e-8)
        if len(r) == 1:
            step = g * np.linalg.norm(n) / np.linalg.norm(r)
        else:
            step = np.stack([g[:, j] * np.linalg.norm(n[:, j]) / np.linalg.norm(r[:, j]) for j in range(g.shape[1])], 1)
        size = np.linalg.norm(step)
        if last and size > limit * last:
            step, size = step * limit * last / size, limit * last
        last = size
        weight = weight * (1 - lr * wd) - lr * scale * (step.T if tall else step)
    return weight


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_is_its_definition(rank, shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(10, *shape) * torch.linspace(1, 3, 10)[:, None, None]
    optimizer = single(start.clone(), "apollo", 0.01, weight_decay=0.3, rank=rank, update_period=4, scale=5.0)
    for gradient in gradients:
        only(optimizer).grad = gradient.clone()
        optimizer.step()
    projectors = [random_projector(rank, 12, t // 4, 0, torch.device("cpu")).numpy() for t in range(10)]
    assert not np.array_equal(projectors[3], projectors[4])
    expected = by_hand(start.numpy(), gradients.numpy(), projectors, 0.01, 0.3, 5.0, 1.01)
    torch.testing.assert_close(only(optimizer).detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_starts_after_a_zero_gradient():
    """Behind a projection that starts at zero the first gradient is zero; the limiter must not freeze the matrix."""
    optimizer = single(torch.zeros(12, 20), "apollo", 0.01)
    norms = []
    for size in (0.0, 1.0, 1.0):
        only(optimizer).grad = torch.full((12, 20), size)
        optimizer.step()
        norms.append(only(optimizer).norm().item())
    assert norms[0] == 0.0
    assert norms[1] > 0.01


def test_resume_through_new_projections_is_bit_equal():
    net = Net(dim=128, wide=256)
    optimizer = make("apollo", net, update_period=3)
    train(net, optimizer, 0, 5)
    again, loaded = reloaded(net, optimizer, lambda network: make("apollo", network, update_period=3))
    torch.rand(100)  # the global generator has no say
    assert train(net, optimizer, 5, 7) == train(again, loaded, 5, 7)


def test_bytes_of_the_matrices():
    """A row of two moments and a projection that is never stored: a hundredth of AdamW's 8 bytes an element."""
    optimizer = single(torch.zeros(256, 512), "apollo", 0.1)
    only(optimizer).grad = torch.randn(256, 512)
    optimizer.step()
    assert optimizer.state_bytes() == 4 * (2 * 512 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update_period": 0}, r"optim\.update_period=0"),
        ({"rank": 100}, "rank=100 is larger"),
        ({"norm_growth_limit": 0.9}, "norm_growth_limit=0.9 must be a number of at least 1"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        make("apollo", Net(), **changes)
