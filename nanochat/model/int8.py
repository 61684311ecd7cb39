"""Ternary matrices times int8 activations in integer arithmetic, exact where a product of floats rounds.

    y = (codes @ trits.T) * token step * weight scale

It needs a weight scale that does not vary along the inner dimension. Which kernel multiplies the integers is the
machine's affair: sums of at most 132,000 products of |code| <= 127 are exact in float32, too, so that the result is the
same to the last bit. The backward pass keeps the integers as they are (they are exact in bfloat16):
dW = (g * step)^T @ codes, dX = g @ (trits * scale).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

from nanochat.compat import int8_product
from nanochat.device import has_int8_products
from nanochat.model.autocast import product_dtype

CUDA_ROWS = 16  # the CUDA kernel takes more rows than these, and widths that are multiples of 8
CUDA_MULTIPLE = 8


def row_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in at least float32, and the int8 step of each row: (..., d) and (..., 1) float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # torch's aminmax over a dimension takes ten times as long as the two together
    high = torch.maximum(wide.amax(-1, keepdim=True), wide.amin(-1, keepdim=True).neg_())
    # a row of zeros stays zero; the floor keeps 0 / 0 away and is far below any activation
    return wide, high.float().div_(127.0).clamp_min_(1e-30)


@torch.compiler.assume_constant_result
def _has_units(device: str) -> bool:
    return has_int8_products(torch.device(device))


def integer_product(codes: Tensor, trits: Tensor) -> Tensor:
    """codes (N, K) int8 @ trits (M, K) int8 transposed -> (N, M) float32, exact."""
    fits = codes.device.type != "cuda" or (
        codes.shape[0] > CUDA_ROWS and codes.shape[1] % CUDA_MULTIPLE == 0 and trits.shape[0] % CUDA_MULTIPLE == 0
    )
    if fits and _has_units(codes.device.type):
        return int8_product(codes, trits.t()).float()
    return codes.float() @ trits.float().t()


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, *tensors: Tensor):
        trits, scales = tensors[count : 2 * count], tensors[2 * count :]
        wide, step = row_steps(x.flatten(0, -2))
        codes = (wide / step).round_().to(torch.int8)  # (N, K)
        dtype = product_dtype(x)
        outs = []
        with torch.autocast(x.device.type, enabled=False):
            for t, s in zip(trits, scales, strict=True):
                y = integer_product(codes, t).mul_(step).mul_(s.t())
                outs.append(y.to(dtype).unflatten(0, x.shape[:-1]))
        ctx.save_for_backward(codes, step, *trits, *scales)
        ctx.dtypes = (x.dtype, tensors[0].dtype)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        codes, step, *rest = ctx.saved_tensors
        trits, scales = rest[: len(gradients)], rest[len(gradients) :]
        x_dtype, weight_dtype = ctx.dtypes
        dx, dw = int8_linear_backward(gradients, codes, step, trits, scales)
        return dx.to(x_dtype), None, *(g.to(weight_dtype) for g in dw), *[None] * (2 * len(gradients))


def int8_linear_backward(
    gradients: Sequence[Tensor], codes: Tensor, step: Tensor, trits: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the activations (..., K), and of each matrix (M, K), in the dtype of `gradients`.

    gradients: (..., M) of each result; codes: (N, K) int8; step: (N, 1).
    """
    dtype = gradients[0].dtype
    rounded, dx, dw = codes.to(dtype), None, []
    with torch.autocast(codes.device.type, enabled=False):
        for g, t, s in zip(gradients, trits, scales, strict=True):
            rows = g.flatten(0, -2)  # (N, M)
            dw.append((rows * step).to(dtype).t() @ rounded)
            part = rows @ t.to(dtype).mul_(s.to(dtype))  # (N, K)
            dx = part if dx is None else dx.add_(part)
    assert dx is not None
    return dx.unflatten(0, gradients[0].shape[:-1]), dw


@wrap_torch_function(lambda x, weights, trits, scales: (x,))
def int8_linear(x: Tensor, weights: list[Tensor], trits: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, ...]:
    """Products of the same activations, rounded to int8 once, with several ternary matrices.

    Args:
        x: (..., K).
        weights: (M, K) each; the latent matrices, which get the gradients.
        trits: (M, K) int8 each.
        scales: (M, 1) or (1, 1) float32 each.

    Returns:
        (..., M) each, in the dtype of a product of x.
    """
    return _Int8Linear.apply(x, len(weights), *weights, *trits, *scales)  # type: ignore[return-value]
