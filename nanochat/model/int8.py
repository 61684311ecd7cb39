"""Ternary matrices times int8 activations in integer arithmetic, exact where a product of floats rounds.

    y = (codes @ trits.T) * token step * weight scale

It needs a weight scale that does not vary along the inner dimension. Which kernel multiplies the integers is the
machine's affair: sums of at most 132,000 products of |code| <= 127 are exact in float32, too, so that the result is the
same to the last bit. The backward pass keeps the integers as they are (they are exact in bfloat16):
dW = (g * step)^T @ codes, dX = g @ (trits * scale).

With `model.int8_backward` dX is an integer product, too. There the inner dimension is that of the outputs, along which
the weight scales vary, so they go into the gradient before it is rounded to int8 (SwitchBack, arXiv:2304.13013, rounds
to the nearest; here the rounding is stochastic, which leaves the mean of dX as it was):
dX = (codes of (g * scale) @ trits) * gradient step.
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

LOW_32 = 0xFFFFFFFF
DRAW_BITS = 24  # a float32 number in [0, 1) has no more


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


def _uniform(x: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-24, in the shape of x: hashes of the place, its value, and the sum of all."""
    bits = x.float().view(torch.int32).to(torch.int64).view(-1)
    salt = bits.sum()  # exact, in any order
    h = torch.arange(x.numel(), device=x.device).mul_(0x9E3779B9).add_(salt.bitwise_xor(salt >> 31))
    h = h.bitwise_xor_(bits).bitwise_and_(LOW_32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x45D9F3B)):  # both below 2^31: no product overflows
        h = h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(LOW_32)
    return (h >> (32 - DRAW_BITS)).to(torch.float32).mul_(2.0**-DRAW_BITS).view(x.shape)


def round_gradient(g: Tensor) -> tuple[Tensor, Tensor]:
    """g (N, M) -> int8 codes (N, M) and float32 steps (N, 1), by the largest magnitude in a row.

    Rounded up or down at random so that codes * steps is g on average; what lies on the grid stays as it is. The random
    numbers are a hash of g itself, so that there is no state to save: the same gradient is rounded in the same way in a
    resumed run and after recomputed activations.
    """
    wide, step = row_steps(g)
    scaled = wide / step
    low = scaled.floor()
    codes = low + (_uniform(wide) < scaled - low)
    return codes.clamp_(-127.0, 127.0).to(torch.int8), step  # a quotient may lie a last bit above 127


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, count: int, int8_backward: bool, *tensors: Tensor):
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
        ctx.dtypes, ctx.int8_backward = (x.dtype, tensors[0].dtype), int8_backward
        return tuple(outs)

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[override]
        codes, step, *rest = ctx.saved_tensors
        trits, scales = rest[: len(gradients)], rest[len(gradients) :]
        x_dtype, weight_dtype = ctx.dtypes
        dx, dw = int8_linear_backward(gradients, codes, step, trits, scales, ctx.int8_backward)
        return dx.to(x_dtype), None, None, *(g.to(weight_dtype) for g in dw), *[None] * (2 * len(gradients))


def int8_linear_backward(
    gradients: Sequence[Tensor],
    codes: Tensor,
    step: Tensor,
    trits: Sequence[Tensor],
    scales: Sequence[Tensor],
    int8_backward: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the activations (..., K), and of each matrix (M, K), in the dtype of `gradients`.

    gradients: (..., M) of each result; codes: (N, K) int8; step: (N, 1); int8_backward: round the gradients for dX.
    """
    dtype = gradients[0].dtype
    rounded, dx, dw = codes.to(dtype), None, []
    with torch.autocast(codes.device.type, enabled=False):
        for g, t, s in zip(gradients, trits, scales, strict=True):
            rows = g.flatten(0, -2)  # (N, M)
            dw.append((rows * step).to(dtype).t() @ rounded)
            if int8_backward:
                own, size = round_gradient(rows * s.t())
                part = integer_product(own, t.t()).mul_(size).to(dtype)  # (N, K)
            else:
                part = rows @ t.to(dtype).mul_(s.to(dtype))
            dx = part if dx is None else dx.add_(part)
    assert dx is not None
    return dx.unflatten(0, gradients[0].shape[:-1]), dw


@wrap_torch_function(lambda x, weights, trits, scales, int8_backward: (x,))
def int8_linear(
    x: Tensor, weights: list[Tensor], trits: list[Tensor], scales: list[Tensor], int8_backward: bool
) -> tuple[Tensor, ...]:
    """Products of the same activations, rounded to int8 once, with several ternary matrices.

    Args:
        x: (..., K).
        weights: (M, K) each; the latent matrices, which get the gradients.
        trits: (M, K) int8 each.
        scales: (M, 1) or (1, 1) float32 each.
        int8_backward: compute the gradient of x in integers, too.

    Returns:
        (..., M) each, in the dtype of a product of x.
    """
    return _Int8Linear.apply(x, len(weights), int8_backward, *weights, *trits, *scales)  # type: ignore[return-value]
