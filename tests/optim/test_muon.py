"""Muon against its definition in float64, written here from singular values and per-element loops of numpy."""

import numpy as np
import pytest
import torch

from nanochat.optim import muon
from nanochat.optim.muon import newton_schulz
from tests.optim.helpers import only, single

PE = np.array(muon.POLAR_EXPRESS)


def polynomial_of_singular_values(x, steps, kind):
    """Newton-Schulz acts on singular values alone: apply the polynomials there."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    for i in range(steps):
        a, b, c = (3.4445, -4.7750, 2.0315) if kind == "classic" else PE[min(i, 4)]
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ v


def brute_force(weight, gradients, lr, wd, o):
    """Muon with all its options in float64; momentum warm-up is left to the caller's `o["momentum"]`."""
    weight = weight.astype(np.float64)
    rows, columns = weight.shape
    m = np.zeros_like(weight)
    v = np.zeros(rows if rows >= columns else columns)
    for gradient in gradients:
        g, mu = gradient.astype(np.float64), o["momentum"]
        if o["ema"]:
            m = mu * m + (1 - mu) * g
            u = mu * m + (1 - mu) * g if o["nesterov"] else m
        else:
            m = mu * m + g
            u = g + mu * m if o["nesterov"] else m
        if o["row_equilibration"]:
            u = np.stack([row / np.sqrt((row**2).sum()) for row in u])
        x = u / np.sqrt((u**2).sum())
        if o["newton_schulz"] == "polar_express":
            x = x / 1.02
        x = polynomial_of_singular_values(x, o["ns_steps"], o["newton_schulz"])
        if o["row_equilibration"]:
            x = x * np.sqrt(min(rows, columns)) / np.linalg.norm(x)
        if o["normuon_beta"]:
            beta, norm = o["normuon_beta"], np.linalg.norm(x)
            v = beta * v + (1 - beta) * (x**2).mean(axis=1 if rows >= columns else 0)
            x = x / (np.sqrt(v)[:, None] if rows >= columns else np.sqrt(v)[None, :])
            x = x * norm / np.linalg.norm(x)
        scale = max(1, rows / columns) ** 0.5 if o["adjust"] == "original" else 0.2 * max(rows, columns) ** 0.5
        mask = (weight * x >= 0) if o["cautious_weight_decay"] else 1.0
        weight = weight * (1 - lr * wd * mask) - lr * scale * x
    return weight


DEFAULT = {
    "momentum": 0.9,
    "nesterov": True,
    "ema": True,
    "ns_steps": 5,
    "newton_schulz": "classic",
    "adjust": "match_rms",
    "row_equilibration": False,
    "normuon_beta": 0.0,
    "cautious_weight_decay": False,
}
RECIPE = {"ns_steps": 3, "adjust": "original", "row_equilibration": True, "normuon_beta": 0.9}
CHANGES = [
    {},
    {"nesterov": False},
    {"ema": False},
    {"ema": False, "nesterov": False},
    {"ns_steps": 3},
    {"newton_schulz": "polar_express"},
    {"newton_schulz": "polar_express", "ns_steps": 7},
    {"adjust": "original"},
    {"row_equilibration": True},
    {"normuon_beta": 0.95},
    {"cautious_weight_decay": True},
    RECIPE,
    RECIPE | {"cautious_weight_decay": True, "ema": False},
]


@pytest.mark.parametrize("shape", [(48, 48), (24, 80), (80, 24)])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_is_its_definition(shape, changes):
    options = DEFAULT | changes
    torch.manual_seed(1)
    start, gradients = torch.randn(shape), torch.randn(6, *shape) * torch.logspace(-6, 2, 6)[:, None, None]
    optimizer = single(start.clone(), "muon", 0.03, weight_decay=0.5, **options)
    for gradient in gradients:
        only(optimizer).grad = gradient.clone()
        optimizer.step()
    expected = brute_force(start.numpy(), gradients.numpy(), 0.03, 0.5, options)
    moved = np.abs(expected - start.numpy()).max()
    assert np.abs(only(optimizer).detach().numpy() - expected).max() < 2e-4 * moved


@pytest.mark.parametrize(
    ("steps", "kind", "low", "high"),
    [(5, "classic", 0.6, 1.2), (3, "classic", 0.4, 1.2), (5, "polar_express", 0.8, 1.2)],
)
@pytest.mark.parametrize("smallest", [1.0, 0.02])
def test_singular_values_of_the_update(steps, kind, low, high, smallest):
    """For singular values between .02 and 1 of the largest one, in a matrix of unit Frobenius norm after division.

    The polynomials need input singular values of at least about .01, hence the small number of large ones.
    """
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(32, 16))[0], torch.linalg.qr(torch.randn(64, 16))[0]
    values = torch.logspace(0, np.log10(smallest), 16)
    x = (u * (values / values.norm())) @ v.T
    found = torch.linalg.svdvals(newton_schulz(x / 1.02, steps, kind))[:16]
    assert low <= found.min()
    assert found.max() <= high


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (512, 256)])
def test_singular_values_of_a_default_step(shape):
    """Gaussian gradients: 5 classic steps keep the bulk within .6-1.2 (a square's few smallest values start below .01
    and cannot be lifted); row equilibration and 3 steps, the recipe, keep the mean near 1."""
    torch.manual_seed(0)
    group = {**DEFAULT, "momentum_now": 0.9}
    values = torch.linalg.svdvals(muon.orthogonalized(torch.randn(shape), group, None))
    inside = ((values > 0.6) & (values < 1.2)).float().mean()
    assert inside >= (0.9 if shape[0] == shape[1] else 1.0)
    values = torch.linalg.svdvals(muon.orthogonalized(torch.randn(shape), {**group, **RECIPE, "ns_steps": 3}, None))
    assert 0.9 < values.square().mean() < 1.1


@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_stacked_is_one_by_one(monkeypatch, shape, options):
    def run(stacked):
        if stacked:
            monkeypatch.setattr(muon, "buckets", lambda parameters: [list(range(len(parameters)))])
        torch.manual_seed(5)
        from nanochat.optim import build

        weights = [(f"w{i}", torch.nn.Parameter(torch.randn(shape))) for i in range(3)]
        optimizer = build(weights, lr=0.02, groups={"all": {"rule": "muon", **options}})
        for _ in range(4):
            for _, w in weights:
                w.grad = torch.randn(shape)
            optimizer.step()
        return torch.stack([w.detach() for _, w in weights]), optimizer.state_dict()["state"]

    (loop, loop_state), (stack, stack_state) = run(False), run(True)
    torch.testing.assert_close(stack, loop, rtol=1e-3, atol=1e-3 * 0.02)
    for name, state in loop_state.items():
        for key, value in state.items():
            torch.testing.assert_close(stack_state[name][key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
def test_zero_gradients_move_nothing(options):
    """As in the first step behind projections that start at zero."""
    start = torch.randn(16, 32)
    optimizer = single(start.clone(), "muon", 0.02, **options)
    only(optimizer).grad = torch.zeros(16, 32)
    optimizer.step()
    assert torch.equal(only(optimizer), start)


def test_momentum_warmup_is_a_function_of_the_step():
    optimizer = single(torch.zeros(4, 4), "muon", 0.1, momentum=0.9, momentum_start=0.8, momentum_warmup=100)
    found = []
    for step in (0, 50, 100, 5000):
        optimizer.set_progress(step, 10_000, lambda s, m: 1.0)
        found.append(optimizer.param_groups[0]["momentum_now"])
    assert found == pytest.approx([0.8, 0.85, 0.9, 0.9])


def test_bfloat16_parameters_keep_a_32_bit_momentum():
    optimizer = single(torch.randn(16, 16).bfloat16(), "muon", 0.1, normuon_beta=0.9)
    only(optimizer).grad = torch.randn(16, 16).bfloat16()
    optimizer.step()
    assert {v.dtype for v in optimizer.state[only(optimizer)].values()} == {torch.float32}
    assert only(optimizer).dtype == torch.bfloat16
