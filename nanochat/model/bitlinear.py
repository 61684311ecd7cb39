"""Ternary weights and int8 activations with straight-through gradients (BitNet b1.58, arXiv:2402.17764).

*Train what ships*: the grid is the one that GGUF's TQ2_0 and TQ1_0 store, a float16 scale for every block of 256
weights along the input dimension, so that exporting a trained model changes no weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

F16_MAX = 65504.0
F16_TINY = 2.0**-24  # the smallest positive float16
ACTIVATION_BLOCK = 256  # ggml's Q8_K


def _ternarise_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(..., n) -> trits (..., n) and scales (..., 1), both in float32."""
    scale = blocks.abs().mean(dim=-1, keepdim=True, dtype=torch.float32)
    scale = scale.clamp_(max=F16_MAX).to(torch.float16).to(torch.float32)
    # a block whose mean rounds to zero divides by the smallest float16 and is then emptied
    trits = blocks.float().div(scale.clamp_min(F16_TINY)).round_().clamp_(-1.0, 1.0)
    if not scale.all():
        trits.mul_(scale > 0)
    return trits, scale


def ternarise(weight: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Split a matrix into trits and the scales they share.

    Args:
        weight: (out, in), any float dtype.
        block: weights per scale along the input dimension; a partial last block averages its real elements;
            0 = one scale for the whole matrix.

    Returns:
        trits: (out, in) float32 in {-1, 0, 1}, and scales: (out, ceil(in / block)) float32 values that are exact
        in float16 ((1, 1) for block 0). A block of scale 0 has trits 0.
    """
    rows, cols = weight.shape
    if block == 0:
        trits, scale = _ternarise_blocks(weight.reshape(1, -1))
        return trits.view(rows, cols), scale
    if cols % block == 0:
        trits, scale = _ternarise_blocks(weight.reshape(rows, -1, block))
        return trits.view(rows, cols), scale[..., 0]
    whole = cols - cols % block
    parts = [_ternarise_blocks(weight[:, whole:])]
    if whole:
        trits, scale = _ternarise_blocks(weight[:, :whole].reshape(rows, -1, block))
        parts.insert(0, (trits.view(rows, whole), scale[..., 0]))
    return torch.cat([t for t, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def dequantise(trits: Tensor, scales: Tensor, block: int = 256) -> Tensor:
    """The inverse of `ternarise`: (out, in) float32 = trits * scales."""
    rows, cols = trits.shape
    if block == 0:
        return trits * scales
    if cols % block == 0:
        return (trits.view(rows, -1, block) * scales[..., None]).view(rows, cols)
    return trits * scales.repeat_interleave(block, 1)[:, :cols]


class _TernaryWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, block: int) -> Tensor:
        return dequantise(*ternarise(weight, block), block).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None


class _Int8Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, per: str) -> Tensor:
        return quantise_activation(x, per)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient, None


def quantise_activation(x: Tensor, per: str = "token") -> Tensor:
    """Round activations to symmetric int8 by the absolute maximum, kept as floats.

    Args:
        x: (..., d).
        per: "token": one scale a row; "block": one for each 256 elements of a row (a partial last block is its
            own); "none": x as it is.
    """
    if per == "none":
        return x
    width = x.shape[-1]
    if per == "token" or width <= ACTIVATION_BLOCK:
        return _round_int8(x)
    if width % ACTIVATION_BLOCK == 0:
        return _round_int8(x.unflatten(-1, (-1, ACTIVATION_BLOCK))).flatten(-2)
    whole = width - width % ACTIVATION_BLOCK
    head = _round_int8(x[..., :whole].unflatten(-1, (-1, ACTIVATION_BLOCK))).flatten(-2)
    return torch.cat((head, _round_int8(x[..., whole:])), -1)


def _round_int8(x: Tensor) -> Tensor:
    low, high = x.aminmax(dim=-1, keepdim=True)
    # a row of zeros stays zero; the floor keeps 0 / 0 away and is far below any activation
    step = torch.maximum(high, low.neg_()).float().div_(127.0).clamp_min_(1e-30)
    return (x / step).round_().mul_(step).to(x.dtype)


def ternary_weight(weight: Tensor, block: int) -> Tensor:
    """(out, in) -> (out, in) on the ternary grid; the gradient passes straight through."""
    return _TernaryWeight.apply(weight, block)  # type: ignore[return-value]


@wrap_torch_function(lambda x, per: (x,))
def int8_activation(x: Tensor, per: str) -> Tensor:
    """(..., d) -> (..., d) on the int8 grid; the gradient passes straight through."""
    return x if per == "none" else _Int8Activation.apply(x, per)  # type: ignore[return-value]


class BitLinear(nn.Module):
    """A matrix of a block: `y = x @ w_q.T`, without bias.

    The gradient with respect to x uses w_q, the one with respect to the weight uses x as it came in (which the
    sub-layer has rounded to int8 once for all the matrices that read it).
    """

    def __init__(self, inputs: int, outputs: int, ternary: bool = True, block: int = 256) -> None:
        super().__init__()
        self.ternary, self.block = ternary, block
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def shipped_weight(self) -> Tensor:
        """(out, in): the weight that the forward pass multiplies by, and that export writes."""
        return ternary_weight(self.weight, self.block) if self.ternary else self.weight

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return F.linear(x, self.shipped_weight())

    def extra_repr(self) -> str:
        kind = f"ternary, block={self.block}" if self.ternary else "float"
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {kind}"
