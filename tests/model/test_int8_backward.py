"""The gradient of the activations in integers: right on average, exact on the grid, the same whenever it is taken."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from nanochat.errors import ConfigError
from nanochat.inference.engine import inference_copy
from nanochat.model import GPTConfig, int8
from nanochat.model.bitlinear import BitLinear, project
from nanochat.objectives import NextToken, Step, linear_cross_entropy
from nanochat.objectives.mtp import MultiTokenPrediction
from tests.model.test_compact_backward import check_against_the_oracle, data, network
from tests.model.test_int8 import FORMS, ROW, kernel, some_linears  # noqa: F401 - a fixture

BACKWARD = replace(ROW, int8_backward=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gradient (N, M), trits (M, K), and scales (M, 1) that differ by a factor of 100."""
    trits = torch.randint(-1, 2, (40, 24), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    return normal(16, 40), trits, torch.logspace(-2, 0, 40)[:, None]


def gradient_of_x(g: torch.Tensor, trits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    codes = torch.zeros(len(g), trits.shape[1], dtype=torch.int8)
    return int8.int8_linear_backward([g], codes, torch.ones(len(g), 1), [trits], [scales], int8_backward=True)[0]


def test_the_mean_over_many_draws_is_the_product_and_the_spread_is_bounded():
    """A draw belongs to all of the matrix: a row more, another in each draw, makes the others' rounding another one."""
    g, trits, scales = operands()
    exact = g.double() @ (trits.double() * scales.double())
    count = 1000
    draws = torch.stack([
        gradient_of_x(torch.cat((g, normal(1, 40, seed=i) * 1e-3)), trits, scales)[:-1].double() for i in range(count)
    ])  # fmt: skip
    step = (g * scales.T).abs().amax(1, keepdim=True).double() / 127
    # a rounding's variance is at most a quarter of the step's square, and those of a column are independent
    bound = (step / 2).square() * trits.double().abs().sum(0)
    variance = (draws - exact).square().mean(0)
    assert (variance <= 1.2 * bound).all()
    assert (variance >= 0.2 * bound).all()  # it does round at random
    # 384 means, each within 5 standard errors of its own
    assert ((draws.mean(0) - exact).abs() <= 5 * (variance / count).sqrt()).all()
    nearest = int8.integer_product((g * scales.T / step).round().to(torch.int8), trits.T).double() * step
    assert ((nearest - exact).abs() > 5 * (variance / count).sqrt()).any()  # a bias would be seen


def test_exact_on_the_grid(kernel):  # noqa: F811
    """Multiples of a step that is a power of two, times scales that are: nothing is left to round."""
    g = torch.randint(-127, 128, (20, 40), generator=torch.Generator().manual_seed(2)).float()
    g[:, 0], g[3] = 127.0, 0.0
    trits = torch.randint(-1, 2, (40, 24), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    scales = 2.0 ** torch.randint(-3, 1, (40, 1), generator=torch.Generator().manual_seed(4))
    got = gradient_of_x(g / scales.T / 64, trits, scales)
    assert torch.equal(got.double(), (g.double() @ trits.double()) / 64)


def test_both_kernels_agree_to_the_last_bit(monkeypatch):
    results = []
    for has in (True, False):
        monkeypatch.setattr(int8, "_has_units", lambda _, has=has: has)
        results.append(gradient_of_x(*operands()))
    assert torch.equal(*results)


def test_codes_stay_within_127():
    for seed in range(50):
        g = normal(64, 32, seed=seed) * 10.0 ** (seed % 9 - 4)
        codes, step = int8.round_gradient(g)
        assert codes.min() >= -127
        assert (codes * step - g).abs().le(step * (1 + 1e-5)).all()


def test_the_hash_is_even_and_its_numbers_are_unrelated():
    x = normal(512, 256)
    u = int8._uniform(x)
    counts = torch.histc(u, 256, 0.0, 1.0)
    assert ((counts - 512).square() / 512).sum() < 256 + 5 * (2 * 256) ** 0.5  # chi squared
    other = int8._uniform(torch.cat((x[:-1], -x[-1:])))  # another sum of bits
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, other)):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert correlation.abs() < 5 / a.numel() ** 0.5


def test_several_matrices_and_the_weights_own_gradients(kernel):  # noqa: F811
    """dX is close to the float one; dW is computed as before, to the last bit."""
    x = normal(2, 9, 96, seed=2).requires_grad_()
    upstream = [normal(2, 9, n, seed=n) for n in (24, 40)]
    found = {}
    for on in (True, False):
        linears = some_linears()
        for linear in linears:
            linear.int8_backward = on
        loss = sum((y * u).sum() for y, u in zip(project(x, *linears), upstream, strict=True))
        found[on] = torch.autograd.grad(loss, [x, *(linear.weight for linear in linears)])
    error = (found[True][0] - found[False][0]).norm() / found[False][0].norm()
    assert 1e-4 < error < 0.02
    assert all(torch.equal(a, b) for a, b in zip(found[True][1:], found[False][1:], strict=True))


@pytest.mark.parametrize("switches", FORMS, ids=str)
def test_a_network_s_gradients_are_close_to_those_without(switches):
    grads = []
    for on in (True, False):
        gpt = network(replace(ROW, **switches, int8_backward=on)).float()
        tokens, targets = data(gpt.config)
        linear_cross_entropy(gpt.hidden(tokens), gpt.head_weight(), targets).loss.backward()
        grads.append({n: p.grad for n, p in gpt.named_parameters()})
    errors = {n: (grads[0][n] - g).norm() for n, g in grads[1].items() if g is not None}
    whole = torch.stack([g.norm() for g in grads[1].values() if g is not None]).norm()
    assert 1e-5 * whole < torch.stack([*errors.values()]).norm() < 0.02 * whole
    for name, error in errors.items():
        assert error <= 0.25 * grads[1][name].norm() + 1e-6, name


@pytest.mark.parametrize("switches", [{}, {"n_kv_heads": 1, "sub_norm": True}, {"streams": 2}], ids=str)
def test_the_compact_backward_follows_it(switches, monkeypatch):
    """The two round other matrices, so both round to the nearest here; in float64, where no rounding is on an edge."""
    monkeypatch.setattr(int8, "_uniform", lambda x: torch.full(x.shape, 0.5))
    check_against_the_oracle(network(replace(BACKWARD, **switches)).double(), monkeypatch, count=14)


def test_with_multi_token_prediction_in_bfloat16():
    gpt, mtp = network(BACKWARD), MultiTokenPrediction(BACKWARD, token_fraction=1.0)
    assert all(m.int8_backward for m in (*gpt.modules(), *mtp.modules()) if isinstance(m, BitLinear))
    with torch.autocast("cpu", torch.bfloat16):
        step = Step.of(gpt, *data(BACKWARD))
        loss = NextToken(BACKWARD)(step) + mtp(step)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in (*gpt.parameters(), *mtp.parameters()))


def test_inference_needs_none_of_it():
    assert not inference_copy(network(BACKWARD)).config.int8_backward


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ({"int8_backward": "yes"}, r"model\.int8_backward='yes' must be true or false"),
        (
            {"int8": False},
            r"int8_backward=true needs the integer forward pass, which is off here; set model\.int8=true",
        ),
        ({"int8": "auto", "ternary": False}, r"int8_backward=true needs the integer forward pass"),
        ({"int8": "auto", "weight_block": 16}, r"int8_backward=true needs the integer forward pass"),
    ],
    ids=str,
)
def test_mistakes(switches, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(BACKWARD, **switches)


def test_a_file_from_before_it_has_none():
    old = {k: v for k, v in dataclasses.asdict(ROW).items() if k != "int8_backward"}
    assert GPTConfig.from_dict(old) == ROW
