"""The norm and its gradients against float64."""

import pytest
import torch

from nanochat.model.norm import RMSNorm


@pytest.mark.parametrize("shape", [(5, 256), (2, 7, 3, 64), (1, 1, 16)])
@pytest.mark.parametrize("factor", [1.0, 1e-4, 1e4])
def test_value_and_gradients(shape, factor):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * factor).requires_grad_()
    norm = RMSNorm(shape[-1], eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    y = norm(x)
    y.backward(upstream)
    wide, gain = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    expected.backward(upstream.double())
    for got, true in ((y, expected), (x.grad, wide.grad), (norm.weight.grad, gain.grad)):
        assert (got.double() - true).norm() <= 2e-6 * true.norm() + 1e-9


def test_zero_rows_stay_zero_and_finite():
    x = torch.zeros(3, 8, requires_grad=True)
    y = RMSNorm(8, eps=1e-6)(x)
    y.sum().backward()
    assert (y == 0).all()
    assert torch.isfinite(x.grad).all()


def test_other_dtypes_take_torch_s_own():
    x = torch.randn(4, 16, dtype=torch.float64)
    norm = RMSNorm(16, eps=1e-6).double()
    assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-6))


@pytest.mark.parametrize("shape", [(5, 256), (2, 7, 3, 64)])
def test_bf16_activations_keep_float32_statistics(shape, recwarn):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + 8.0).bfloat16().requires_grad_()
    norm = RMSNorm(shape[-1], eps=1e-6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=generator)
    upstream = torch.randn(shape, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    y.backward(upstream)
    assert (y.dtype, x.grad.dtype, norm.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide, gain = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    expected.backward(upstream.double())
    # a rounding at the end, and nothing on the way
    assert (y.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert torch.equal(y, expected.bfloat16()) or (y.double() - expected).norm() <= 2**-9 * expected.norm()
    assert (x.grad.double() - wide.grad).norm() <= 2**-8 * wide.grad.norm()
    assert (norm.weight.grad.double() - gain.grad).norm() <= 1e-5 * gain.grad.norm()
    assert not recwarn.list
