"""Root-mean-square norm (arXiv:1910.07467).

On a CPU torch composes it, and its gradient, of a dozen passes over memory; written out it takes a third of the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function


class _RMSNorm(torch.autograd.Function):
    """Statistics, products and the gain's gradient in float32, whatever x is; the result is of x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()  # (..., 1)
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(wide, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        dtype, x, gradient = x.dtype, x.float(), gradient.float()
        products = (gradient * x).reshape(-1, x.shape[-1])  # (N, d)
        # dx = s w g - x s^3 / d sum(w g x), dw = sum over rows of s g x
        with torch.autocast(x.device.type, enabled=False):
            along = products.mv(weight).view_as(scale).mul_(scale.pow(3)).div_(x.shape[-1])
            grad_weight = (scale.reshape(1, -1) @ products).view_as(weight)
        return (gradient * weight).mul_(scale).addcmul_(x, along, value=-1.0).to(dtype), grad_weight, None


class _WideRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, square: Tensor | None, weight: Tensor, width: int, eps: float):
        ctx.set_materialize_grads(False)
        total = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()  # (..., 1)
        if square is not None:
            total.add_(square)
        scale = total.div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.width, ctx.has_square = width, square is not None
        return torch.mul(x, scale).mul_(weight), scale

    @staticmethod
    def backward(ctx, gradient: Tensor | None, scale_gradient: Tensor | None):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        along = torch.zeros_like(scale) if scale_gradient is None else scale_gradient  # d loss / d scale
        if gradient is not None:
            products = (gradient * x).reshape(-1, x.shape[-1])  # (N, d)
            with torch.autocast(x.device.type, enabled=False):
                along = along + products.mv(weight).view_as(scale)
                grad_weight = (scale.reshape(1, -1) @ products).view_as(weight)
            grad_x = (gradient * weight).mul_(scale)
        # d scale / dx = -scale^3 x / width, d scale / d square = -scale^3 / (2 width)
        along = along * scale.pow(3).div_(ctx.width)
        grad_x = x * -along if grad_x is None else grad_x.addcmul_(x, along, value=-1.0)
        return grad_x, along * -0.5 if ctx.has_square else None, grad_weight, None, None


@wrap_torch_function(lambda x, square, weight, width, eps: (x, square))
def wide_rms_norm(x: Tensor, square: Tensor | None, weight: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of a stream that is wider than x: x * scale * weight, scale = 1 / sqrt((|x|² + square) / width + eps).

    x: (..., d); square: (..., 1), what the rest of the stream adds to |x|², None for zeros; width: of the
    whole. Returns the normalised x (..., d) and the scale (..., 1), in float32 at least.
    """
    return _WideRMSNorm.apply(x.to(torch.promote_types(x.dtype, torch.float32)), square, weight, width, eps)  # type: ignore[return-value]


@wrap_torch_function(lambda x, weight, eps: (x,))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (..., d)."""
    if x.device.type == "cpu" and weight.dtype == torch.float32 and x.dtype in (torch.float32, torch.bfloat16):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)  # mixed dtypes have no fused kernel


class RMSNorm(nn.Module):
    """The norm with its gain: `weight` (d,), ones at the start.

    width: of the whole stream, where x is only a part of it (see `nanochat.model.value_embeddings`); None: of x.
    """

    def __init__(self, dim: int, eps: float, width: int | None = None) -> None:
        super().__init__()
        self.eps, self.width = eps, dim if width is None else width
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, square: Tensor | None = None) -> Tensor:
        """x: (..., d); square: (..., 1), the sum of squares of the rest of the stream; returns (..., d)."""
        if square is None and self.width == x.shape[-1]:
            return rms_norm(x, self.weight, self.eps)
        return self.with_scale(x, square)[0]

    def with_scale(self, x: Tensor, square: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm, and the factor (..., 1) by which it has scaled the stream."""
        return wide_rms_norm(x, square, self.weight, self.width, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
