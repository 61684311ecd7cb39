"""BitLinear against its definition, element by element, and its straight-through gradients."""

import copy
import math

import numpy as np
import pytest
import torch

from nanochat.model import GPTConfig, bitlinear
from nanochat.model.bitlinear import (
    SCALE_MAX,
    BitLinear,
    dequantise,
    int8_activation,
    keep_trits,
    project,
    quantise_activation,
    ternarise,
)
from nanochat.optim import build


def rounded_scale(mean: float, scale_format: str) -> float:
    """float16 of a mean, and the nearest number with a mantissa of 8 bits to that."""
    half = float(np.float16(min(mean, SCALE_MAX[scale_format])))
    if scale_format == "float16" or half == 0:
        return half
    mantissa, exponent = math.frexp(half)  # half = mantissa * 2 ** exponent, mantissa in [0.5, 1)
    return math.ldexp(np.round(mantissa * 256) / 256, exponent)


def brute_force(weight: np.ndarray, block: int | str, scale_format: str) -> tuple[np.ndarray, np.ndarray]:
    """The definition: the rounded mean magnitude of each block, nearest of -1, 0, 1."""
    rows, cols = weight.shape
    width = block if isinstance(block, int) and block else cols
    trits = np.zeros_like(weight)
    scales = np.zeros((rows, math.ceil(cols / width)))
    for r in range(rows):
        for b, start in enumerate(range(0, cols, width)):
            part = weight[r, start : start + width]
            whole = weight if block == 0 else part
            s = rounded_scale(np.abs(whole).mean(dtype=np.float64), scale_format)
            scales[r, b] = s
            for c, w in enumerate(part):
                trits[r, start + c] = 0 if s == 0 else max(-1, min(1, np.round(w / s)))
    return trits, scales


@pytest.mark.parametrize("shape", [(3, 256), (5, 512), (2, 300), (4, 40), (1, 257)])
@pytest.mark.parametrize("block", [256, 128, "row", 0])
@pytest.mark.parametrize("scale_format", SCALE_MAX)
def test_grid_is_the_definition(shape, block, scale_format):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    trits, scales = ternarise(weight, block, scale_format)
    expected_trits, expected_scales = brute_force(weight.double().numpy(), block, scale_format)
    assert torch.equal(trits.double(), torch.from_numpy(expected_trits))
    assert np.array_equal(np.broadcast_to(scales.double().numpy(), expected_scales.shape), expected_scales)
    assert torch.equal(scales, scales.half().float()), "a scale is not a float16 value"
    if scale_format == "bfloat16":
        assert torch.equal(scales, scales.bfloat16().float()), "a scale is not a bfloat16 value"
    width = block if isinstance(block, int) and block else shape[1]
    spread = np.repeat(expected_scales, width, axis=1)[:, : shape[1]]
    assert np.array_equal(dequantise(trits, scales, block).double().numpy(), expected_trits * spread)


@pytest.mark.parametrize("scale_format", SCALE_MAX)
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-9, 1e-6, 1e6, 1e30])
def test_extreme_weights_stay_finite_and_keep_their_signs(factor, scale_format):
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)) * factor
    weight[0] = 0.0
    trits, scales = ternarise(weight, 256, scale_format)
    shipped = dequantise(trits, scales)
    assert torch.equal(shipped, shipped.half().float())
    assert torch.isfinite(shipped).all()
    assert set(trits.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert (shipped[0] == 0).all()
    assert ((shipped == 0) | (shipped.sign() == weight.sign())).all()
    if factor in (1e-6, 1e6):
        assert (trits[1:] != 0).float().mean() > 0.5
    if factor <= 1e-9:
        assert (trits == 0).all(), "a block whose scale rounds to zero must ship zeros"


def test_zero_fraction_of_gaussian_weights():
    trits, _ = ternarise(torch.randn(64, 1024, generator=torch.Generator().manual_seed(2)))
    assert (trits != 0).float().mean().item() == pytest.approx(0.690, abs=0.005)  # P(|z| > mean|z| / 2)


def test_gradients_are_straight_through():
    generator = torch.Generator().manual_seed(3)
    linear = BitLinear(300, 24)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
    x = torch.randn(2, 7, 300, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 7, 24, generator=generator)
    y = linear(x)
    y.backward(upstream)
    w_q = dequantise(*ternarise(linear.weight.detach()))
    x_q = quantise_activation(x.detach())
    assert torch.equal(y.detach(), torch.nn.functional.linear(x_q, w_q))
    assert torch.equal(x.grad, (upstream.flatten(0, 1) @ w_q).view_as(x))
    assert torch.equal(linear.weight.grad, upstream.flatten(0, 1).T @ x_q.flatten(0, 1))
    assert not torch.equal(x_q, x.detach())
    assert not torch.equal(w_q, linear.weight.detach())


@pytest.mark.parametrize("per", ["token", "block"])
@pytest.mark.parametrize("width", [64, 256, 512, 300])
def test_int8_activation_is_the_nearest_step(per, width):
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(4)).mul_(3.0)
    x[0, 0] = 0.0
    got = quantise_activation(x, per)
    size = width if per == "token" else 256
    for start in range(0, width, size):
        part, result = x[..., start : start + size].double(), got[..., start : start + size].double()
        step = part.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(step > 0, result / step.clamp_min(1e-300), 0.0)
        assert (codes - codes.round()).abs().max() < 1e-3
        assert codes.abs().max() <= 127.001
        assert ((part - result).abs() <= step / 2 * (1 + 1e-5)).all()
    assert (got[0, 0] == 0).all()


def test_int8_activation_of_extreme_rows():
    x = torch.tensor([[1e-20, -2e-20], [1e20, -5e19], [0.0, 0.0]])
    got = quantise_activation(x)
    assert torch.allclose(got, x, rtol=1e-2, atol=0.0)  # half a step of the row


def test_none_leaves_activations_alone():
    x = torch.randn(3, 8)
    assert int8_activation(x, "none") is x


def counted(monkeypatch) -> list[int]:
    """How often a weight is ternarised from now on: the length of the list."""
    calls = []
    monkeypatch.setattr(bitlinear, "ternarise", lambda *args: calls.append(1) or ternarise(*args))
    return calls


def test_a_weight_is_ternarised_once_until_it_changes(monkeypatch):
    linear, x = BitLinear(32, 8), torch.randn(4, 32)
    torch.nn.init.normal_(linear.weight)
    keep_trits(linear, True)
    calls = counted(monkeypatch)
    for _ in range(3):  # micro-batches
        linear(x).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        linear(x)  # validation between two steps reads what training keeps
        assert len(calls) == 1
        linear.weight.add_(torch.randn(8, 32))  # the optimizer's step
    y = linear(x)
    assert len(calls) == 2
    expected = dequantise(*ternarise(linear.weight.detach()))
    assert torch.equal(y, torch.nn.functional.linear(quantise_activation(x), expected))


@pytest.mark.parametrize("change", ["load", "assign", "data", "copy", "cast"])
def test_a_changed_weight_is_never_taken_for_the_old_one(change):
    linear, x = BitLinear(32, 8), torch.randn(4, 32)
    torch.nn.init.normal_(linear.weight)
    keep_trits(linear, True)
    linear(x).sum().backward()
    other = torch.randn(8, 32)
    if change == "load":
        linear.load_state_dict({"weight": other})
    elif change == "assign":
        linear.load_state_dict({"weight": other}, assign=True)
    elif change == "data":
        linear.weight = torch.nn.Parameter(other)
    elif change == "copy":
        linear = copy.deepcopy(linear)
        with torch.no_grad():
            linear.weight.copy_(other)
    else:
        linear = linear.double()
        with torch.no_grad():
            linear.weight.copy_(other)
        x = x.double()
    shipped = dequantise(*ternarise(other.to(x.dtype))).to(x.dtype)
    assert torch.equal(linear.shipped_weight().detach(), shipped)
    assert torch.equal(linear(x), torch.nn.functional.linear(quantise_activation(x), shipped))


def test_nothing_is_kept_unless_a_loop_asks_for_it():
    linear = BitLinear(32, 8)
    torch.nn.init.normal_(linear.weight)
    linear(torch.randn(4, 32)).sum().backward()
    assert linear._kept is None
    keep_trits(linear, True)
    linear(torch.randn(4, 32))
    assert linear._kept is not None
    assert copy.deepcopy(linear)._kept is None
    keep_trits(linear, False)
    assert linear._kept is None


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "lion", "lion8bit", "muon", "muon8bit"])
def test_every_optimizer_moves_the_version(rule):
    """Torch's fused AdamW does not by itself, and a kept weight would stay the old one."""
    linear, x = BitLinear(32, 8), torch.randn(4, 32)
    torch.nn.init.normal_(linear.weight)
    optimizer = build([("weight", linear.weight)], lr=0.5, groups={"all": {"rule": rule}})
    keep_trits(linear, True)
    linear(x).square().sum().backward()
    optimizer.step()
    shipped = dequantise(*ternarise(linear.weight.detach()))
    assert torch.equal(linear.shipped_weight().detach(), shipped)


@pytest.mark.parametrize("block", [256, "row", 0])
def test_under_autocast_the_product_reads_the_very_weights_of_the_file(block):
    """bfloat16 holds trit * scale exactly: the product's weights are those that export writes, bit for bit."""
    linear = BitLinear(512, 24, GPTConfig(weight_block=block, activation_scale="none"))
    torch.nn.init.normal_(linear.weight, std=0.03)
    exported = dequantise(*ternarise(linear.weight.detach(), block), block)
    with torch.autocast("cpu", torch.bfloat16):
        identity = linear(torch.eye(512))  # (512, 24): the columns of the weight that was multiplied by
    assert identity.dtype == torch.bfloat16
    assert torch.equal(identity.float().T, exported)
    old = BitLinear(512, 24, GPTConfig(weight_block=block, activation_scale="none", scale_format="float16"))
    old.load_state_dict(linear.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = old(torch.eye(512)).float().T
    if block != 0:  # a single scale may be exact by chance
        assert not torch.equal(rounded, old.shipped_weight().detach())  # what the scale format is for


def test_matrices_that_read_the_same_activations_round_them_once(monkeypatch):
    linears = [BitLinear(32, 8), BitLinear(32, 12)]
    for linear in linears:
        torch.nn.init.normal_(linear.weight)
    x, rounded = torch.randn(4, 32), []
    monkeypatch.setattr(bitlinear, "quantise_activation", lambda *a: rounded.append(1) or quantise_activation(*a))
    together = project(x, *linears)
    assert len(rounded) == 1
    assert all(torch.equal(y, linear(x)) for y, linear in zip(together, linears, strict=True))
