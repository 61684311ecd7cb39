"""Attention as plain products, and which of the two ways is taken, against dense float64 scores."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import nanochat.model.attention as attention
from nanochat.model.attention import causal_attention
from nanochat.model.rotary import apply_rope, rope_table

PLAIN = attention._PlainAttention


def inputs(length=40, heads=4, groups=2, batch=2, head_dim=16, dtype=torch.float64):
    source = torch.Generator().manual_seed(0)
    shapes = [(batch, length, n, head_dim) for n in (heads, groups, groups, heads)]
    q, k, v, upstream = (torch.randn(shape, generator=source).to(dtype) for shape in shapes)
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), upstream


def dense(q, k, v):
    """The definition: (B, T, H, head_dim)."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("block", [7, 40, 128])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_plain_products_and_their_gradients(groups, block, keep, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    tensors, upstream = inputs(groups=groups)
    y = PLAIN.apply(*tensors, keep)
    got = torch.autograd.grad(y, tensors, upstream)
    expected = dense(*tensors)
    assert torch.allclose(y, expected, atol=1e-12)
    for a, b in zip(got, torch.autograd.grad(expected, tensors, upstream), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("length", [2, 40, 300])
def test_bf16_is_as_close_as_torchs_kernel(length):
    (q, k, v), upstream = inputs(length, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = [dense(*exact), *torch.autograd.grad(dense(*exact), exact, upstream.double())]

    def errors(function):
        y = function(q, k, v)
        found = [y, *torch.autograd.grad(y, (q, k, v), upstream)]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]

    def torchs(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    for own, other in zip(errors(causal_attention), errors(torchs), strict=True):
        assert own <= max(1.5 * other, 5e-3)


@pytest.mark.parametrize(
    ("dtype", "autocast", "queries", "plain"),
    [
        (torch.float32, False, 24, False),
        (torch.float32, True, 24, True),
        (torch.bfloat16, False, 24, True),
        (torch.bfloat16, False, 1, False),  # a token that is decoded
        (torch.bfloat16, False, 5, False),  # a prompt behind a prefix
    ],
)
def test_which_way_is_taken(dtype, autocast, queries, plain, monkeypatch):
    calls = []

    def apply(*args):
        calls.append(args)
        return PLAIN.apply(*args)

    monkeypatch.setattr(attention, "_PlainAttention", SimpleNamespace(apply=apply))
    (q, k, v), _ = inputs(24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = causal_attention(q[:, -queries:], k, v)
    assert bool(calls) == plain
    assert (y.double() - dense(q.double(), k.double(), v.double())[:, -queries:]).abs().max() < 0.03


def test_memory_that_waits_for_the_backward_grows_with_the_length_alone(monkeypatch):
    def saved(length):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        tensors, _ = inputs(length, batch=1, dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            causal_attention(*tensors)
        return sum(sizes)

    monkeypatch.setattr(attention, "KEEP_LENGTH", 64)
    assert saved(1024) == 8 * saved(128)
    assert saved(64) > saved(128) / 2  # the short one keeps its probabilities


def test_rope_in_bf16():
    cos, sin = rope_table(200, 16, 1e5)
    x = torch.randn(1, 200, 2, 16, generator=torch.Generator().manual_seed(1))
    exact = apply_rope(x.double(), cos.double(), sin.double())
    rounded = apply_rope(x.bfloat16(), cos, sin)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() <= 2**-7 * exact.norm()
