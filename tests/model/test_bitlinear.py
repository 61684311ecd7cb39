"""BitLinear against its definition, element by element, and its straight-through gradients."""

import math

import numpy as np
import pytest
import torch

from nanochat.model.bitlinear import BitLinear, dequantise, int8_activation, quantise_activation, ternarise


def brute_force(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The grid of DESIGN: float16 of the mean magnitude of each block, nearest of -1, 0, 1."""
    rows, cols = weight.shape
    width = block or cols
    trits = np.zeros_like(weight)
    scales = np.zeros((rows, math.ceil(cols / width)))
    for r in range(rows):
        for b, start in enumerate(range(0, cols, width)):
            part = weight[r, start : start + width]
            whole = weight if block == 0 else part
            s = float(np.float16(min(np.abs(whole).mean(dtype=np.float64), 65504.0)))
            scales[r, b] = s
            for c, w in enumerate(part):
                trits[r, start + c] = 0 if s == 0 else max(-1, min(1, np.round(w / s)))
    return trits, scales


@pytest.mark.parametrize("shape", [(3, 256), (5, 512), (2, 300), (4, 40), (1, 257)])
@pytest.mark.parametrize("block", [256, 128, 0])
def test_grid_is_the_definition(shape, block):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    trits, scales = ternarise(weight, block)
    expected_trits, expected_scales = brute_force(weight.double().numpy(), block)
    assert torch.equal(trits.double(), torch.from_numpy(expected_trits))
    assert np.array_equal(np.broadcast_to(scales.double().numpy(), expected_scales.shape), expected_scales)
    assert torch.equal(scales, scales.half().float()), "a scale is not a float16 value"
    width = block or shape[1]
    spread = np.repeat(expected_scales, width, axis=1)[:, : shape[1]]
    assert np.array_equal(dequantise(trits, scales, block).double().numpy(), expected_trits * spread)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-9, 1e-6, 1e6, 1e30])
def test_extreme_weights_stay_finite_and_keep_their_signs(factor):
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)) * factor
    weight[0] = 0.0
    trits, scales = ternarise(weight)
    shipped = dequantise(trits, scales)
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
    rounded = int8_activation(x, "token")
    y = linear(rounded)
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
