"""Rotary position embedding, half-split pairing (RoFormer, arXiv:2104.09864; the "NeoX" order of llama.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function


def rope_table(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / head_dim): two (length, head_dim / 2) float32 tensors.

    The angles are taken in float64, so that position 4095 is as exact as position 1.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # (length, head_dim / 2)
    return angle.cos().float(), angle.sin().float()


@wrap_torch_function(lambda x, cos, sin: (x, cos, sin))
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn element i with element i + head_dim / 2.

    x: (..., T, H, head_dim); cos, sin: (..., T, head_dim / 2), the rows of the table at x's positions.
    """
    # one copy per head: the products then run over contiguous memory, in half the time
    shape = (*cos.shape[:-1], x.shape[-2], cos.shape[-1])  # (..., T, H, head_dim / 2)
    cos, sin = (t.unsqueeze(-2).expand(shape).to(x.dtype).contiguous() for t in (cos, sin))
    return _Rotate.apply(x, cos, sin)  # type: ignore[return-value]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which cannot write into a part of a tensor, and fuses these anyway
        return torch.cat((first * cos - direction * second * sin, second * cos + direction * first * sin), -1)
    y = torch.empty_like(x)
    y_first, y_second = y.chunk(2, dim=-1)
    torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=y_second).addcmul_(first, sin, value=direction)
    return y
