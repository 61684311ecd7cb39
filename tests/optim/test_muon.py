"""Muon against its definition in float64, written here from singular values and per-element loops of numpy."""

import numpy as np
import pytest
import torch

from nanochat.errors import UserError
from nanochat.optim import build
from nanochat.optim.newton_schulz import POLAR_EXPRESS, newton_schulz
from nanochat.optim.rules import muon
from tests.optim.helpers import only, single

PE = np.array(POLAR_EXPRESS)


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
    "ns_dtype": "float32",
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_of_the_update(steps, kind, low, high, smallest, dtype):
    """For singular values between .02 and 1 of the largest one, in a matrix of unit Frobenius norm after division.

    The polynomials need input singular values of at least about .01, hence the small number of large ones.
    """
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(32, 16))[0], torch.linalg.qr(torch.randn(64, 16))[0]
    values = torch.logspace(0, np.log10(smallest), 16)
    x = (u * (values / values.norm())) @ v.T
    found = torch.linalg.svdvals(newton_schulz((x / 1.02).to(dtype), steps, kind).double())[:16]
    assert low <= found.min()
    assert found.max() <= high


def one_update(gradient, group):
    """The orthogonal update of a first step."""
    return muon.muon_updates([gradient], [{"momentum": torch.zeros_like(gradient)}], group)[0]


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (512, 256)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_of_a_default_step(shape, dtype):
    """Gaussian gradients: 5 classic steps keep the bulk within .6-1.2 (a square's few smallest values start below .01
    and cannot be lifted); row equilibration and 3 steps, the recipe, keep the mean near 1."""
    torch.manual_seed(0)
    group = {**DEFAULT, "ns_dtype": dtype}
    values = torch.linalg.svdvals(one_update(torch.randn(shape), group).double())
    inside = ((values > 0.6) & (values < 1.2)).double().mean()
    assert inside >= (0.9 if shape[0] == shape[1] else 1.0)
    recipe = {**group, **RECIPE, "normuon_beta": 0.0}
    values = torch.linalg.svdvals(one_update(torch.randn(shape), recipe).double())
    assert 0.9 < values.square().mean() < 1.1


@pytest.mark.parametrize("kind", ["classic", "polar_express"])
def test_bfloat16_keeps_the_singular_vectors(kind):
    """Against the polynomials on singular values in float64: the error is of bfloat16's rounding, 2^-8 a product."""
    torch.manual_seed(0)
    x = torch.randn(64, 96)
    x /= 1.02 * x.norm()
    exact = torch.from_numpy(polynomial_of_singular_values(x.double().numpy(), 5, kind))
    errors = {
        dtype: (newton_schulz(x.to(dtype, copy=True), 5, kind).double() - exact).norm() / exact.norm()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert errors[torch.float32] < 1e-4
    assert 1e-4 < errors[torch.bfloat16] < 0.05


@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_stacked_is_one_by_one(monkeypatch, shape, options):
    def run(stacked):
        if stacked:
            monkeypatch.setattr(muon, "buckets", lambda parameters: [list(range(len(parameters)))])
        torch.manual_seed(5)
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


def test_stacks_are_bounded(monkeypatch):
    """Matrices of a shape go together on a device that is not a CPU, up to `STACKED` elements at a time."""
    monkeypatch.setattr(muon, "STACKED", 40)
    matrices = [torch.empty(shape, device="meta") for shape in [(4, 4), (4, 5), (4, 4), (4, 4), (8, 8), (4, 5)]]
    assert sorted(muon.buckets(matrices)) == [[0, 2], [1, 5], [3], [4]]
    assert muon.buckets([torch.empty(4, 4)] * 2) == [[0], [1]]


def own_dtype(monkeypatch, dtype, **options):
    """A Muon optimizer on a machine whose fast products are of `dtype`."""
    monkeypatch.setattr(muon, "matmul_dtype", lambda device: dtype)
    return single(torch.ones(16, 32), "muon", 0.1, **options)


def test_the_dtype_of_newton_schulz_is_the_device_s_or_what_is_said(monkeypatch):
    assert own_dtype(monkeypatch, torch.bfloat16).param_groups[0]["ns_dtype"] == "bfloat16"
    assert own_dtype(monkeypatch, torch.float32).param_groups[0]["ns_dtype"] == "float32"
    said = own_dtype(monkeypatch, torch.bfloat16, ns_dtype="float32").param_groups[0]
    assert said["ns_dtype"] == "float32"
    seen = []
    known = muon.newton_schulz
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *rest: seen.append(x.dtype) or known(x, *rest))
    for dtype in ("float32", "bfloat16"):
        optimizer = single(torch.ones(16, 32), "muon", 0.1, ns_dtype=dtype)
        only(optimizer).grad = torch.randn(16, 32)
        optimizer.step()
        assert only(optimizer).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


def test_a_run_that_goes_elsewhere_keeps_its_dtype(monkeypatch, caplog):
    there = own_dtype(monkeypatch, torch.bfloat16)
    state = there.state_dict()
    assert state["groups"][0]["ns_dtype"] == "bfloat16"
    here = own_dtype(monkeypatch, torch.float32)
    here.load_state_dict(state)
    assert here.param_groups[0]["ns_dtype"] == "bfloat16"
    assert (
        "ns_dtype stays bfloat16, as in the checkpoint; a new run on this machine would choose float32" in caplog.text
    )
    again = own_dtype(monkeypatch, torch.float32)
    again.load_state_dict(here.state_dict())
    assert again.param_groups[0]["ns_dtype"] == "bfloat16"
    with pytest.raises(UserError, match="ns_dtype=bfloat16, this run has ns_dtype=float32; set it to the checkpoint's"):
        own_dtype(monkeypatch, torch.float32, ns_dtype="float32").load_state_dict(state)


def test_states_of_before_there_was_a_dtype_are_of_float32(monkeypatch, caplog):
    state = own_dtype(monkeypatch, torch.float32).state_dict()
    del state["groups"][0]["ns_dtype"]
    own_dtype(monkeypatch, torch.float32).load_state_dict(state)
    assert not caplog.text
    fast = own_dtype(monkeypatch, torch.bfloat16)
    fast.load_state_dict(state)
    assert fast.param_groups[0]["ns_dtype"] == "float32"
    assert "stays float32" in caplog.text


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
