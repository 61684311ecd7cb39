"""Ternary weights and int8 activations with straight-through gradients (BitNet b1.58, arXiv:2402.17764).

*Train what ships*: the grid is one that GGUF's TQ2_0 and TQ1_0 store, a float16 scale for every block of 256 weights
along the input dimension, so that exporting a trained model changes no weight. The scales are also exact in bfloat16,
so that a product in bfloat16 multiplies by the very weights of the file.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from nanochat.model.autocast import product_dtype, widened
from nanochat.model.config import GPTConfig, constant_scales
from nanochat.model.int8 import int8_linear, row_steps

SCALE_MAX = {"float16": 65504.0, "bfloat16": 65280.0}
"""the largest scale of each format; bfloat16: of those that are float16 numbers, too"""
ACTIVATION_BLOCK = 256  # ggml's Q8_K


def _ternarise_blocks(blocks: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    """(..., n) -> trits (..., n) and scales (..., 1), both in float32."""
    blocks = blocks.float()  # of a weight in bfloat16 the same sums as of its export
    scale = blocks.abs().mean(dim=-1, keepdim=True)
    scale = scale.clamp_(max=SCALE_MAX[scale_format]).to(torch.float16)
    if scale_format == "bfloat16":
        scale = scale.to(torch.bfloat16)  # at most 8 bits of a float16 number are one, subnormal or not
    scale = scale.to(torch.float32)
    # a block whose mean rounds to zero is emptied: its weights are finite, and finite / inf = 0
    trits = blocks.div(scale.masked_fill(scale == 0, torch.inf)).round_().clamp_(-1.0, 1.0)
    return trits, scale


def ternarise(weight: Tensor, block: int | str = 256, scale_format: str = "bfloat16") -> tuple[Tensor, Tensor]:
    """Split a matrix into trits and the scales they share.

    Args:
        weight: (out, in), any float dtype.
        block: weights per scale along the input dimension; a partial last block averages its real elements;
            "row" = one scale for each row, 0 = one for the whole matrix.
        scale_format: "bfloat16": scales that are exact in float16 and in bfloat16; "float16": in float16 alone.

    Returns:
        trits: (out, in) float32 in {-1, 0, 1}, and scales: (out, ceil(in / block)) float32 ((1, 1) for block 0).
        A block of scale 0 has trits 0.
    """
    rows, cols = weight.shape
    if block == 0:
        trits, scale = _ternarise_blocks(weight.reshape(1, -1), scale_format)
        return trits.view(rows, cols), scale
    block = _width(block, cols)
    if cols % block == 0:
        trits, scale = _ternarise_blocks(weight.reshape(rows, -1, block), scale_format)
        return trits.view(rows, cols), scale[..., 0]
    whole = cols - cols % block
    parts = [_ternarise_blocks(weight[:, whole:], scale_format)]
    if whole:
        trits, scale = _ternarise_blocks(weight[:, :whole].reshape(rows, -1, block), scale_format)
        parts.insert(0, (trits.view(rows, whole), scale[..., 0]))
    return torch.cat([t for t, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def dequantise(trits: Tensor, scales: Tensor, block: int | str = 256) -> Tensor:
    """The inverse of `ternarise`: (out, in) = trits * scales, in their dtype."""
    rows, cols = trits.shape
    if block == 0:
        return trits * scales
    block = _width(block, cols)
    if cols % block == 0:
        return (trits.view(rows, -1, block) * scales[..., None]).view(rows, cols)
    return trits * scales.repeat_interleave(block, 1)[:, :cols]


def _width(block: int | str, cols: int) -> int:
    return cols if block == "row" else int(block)


class _StraightThrough(torch.autograd.Function):
    """`value` in the forward pass, in place of `source`, which gets the gradient."""

    @staticmethod
    def forward(ctx, source: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient.to(ctx.dtype), None


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
    wide, step = row_steps(x)
    return (wide / step).round_().mul_(step).to(x.dtype)


@wrap_torch_function(lambda x, per: (x,))
def int8_activation(x: Tensor, per: str) -> Tensor:
    """(..., d) -> (..., d) on the int8 grid; the gradient passes straight through."""
    if per == "none":
        return x
    return _StraightThrough.apply(x, quantise_activation(x.detach(), per))  # type: ignore[return-value]


class _Quantised(NamedTuple):
    """The ternary form of a weight, and which value of which weight it was made of."""

    trits: Tensor
    """(out, in) int8"""
    scales: Tensor
    """as `ternarise` gives them"""
    weight: weakref.ref[Tensor]
    version: int


class BitLinear(nn.Module):
    """A matrix of a block: `y = x @ w_q.T`, without bias; `project` applies one or more of them.

    The gradient with respect to x uses w_q, the one with respect to the weight uses x as it was rounded to int8.

    `keep_trits` makes the micro-batches of a step share the trits (a byte a weight): they are made again when the
    weight's version counter has moved. That is for a training loop to switch on, whose optimizer moves the counter:
    torch's fused ones do not.
    """

    keep_trits = False

    def __init__(self, inputs: int, outputs: int, config: GPTConfig | None = None) -> None:
        super().__init__()
        config = config or GPTConfig()
        self.ternary, self.block, self.scale_format = config.ternary, config.weight_block, config.scale_format
        self.activation_scale = config.activation_scale if config.ternary else "none"
        self.int8 = config.int8 is True and constant_scales(self.block, inputs)
        self.int8_backward = config.int8_backward
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self._kept: _Quantised | None = None

    def quantised(self) -> tuple[Tensor, Tensor]:
        """(trits, scales): int8 (out, in), and float32 as `ternarise` gives them."""
        weight, kept = self.weight, self._kept
        # a compiled block makes them within its kernels
        if not self.keep_trits or torch.compiler.is_compiling():
            return self._quantise()
        if kept is None or kept.weight() is not weight or kept.version != weight._version:
            kept = self._kept = _Quantised(*self._quantise(), weakref.ref(weight), weight._version)
        return kept.trits, kept.scales

    def _quantise(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            trits, scales = ternarise(self.weight, self.block, self.scale_format)
            return trits.to(torch.int8), scales

    def shipped_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in): the weight that the forward pass multiplies by, and that export writes; in its own dtype."""
        if not self.ternary:
            return self.weight if dtype is None else widened(self.weight, dtype)
        trits, scales = self.quantised()
        dtype = dtype or self.weight.dtype
        with torch.no_grad():
            value = dequantise(trits.to(dtype), scales.to(dtype), self.block)
        return _StraightThrough.apply(self.weight, value)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return project(x, self)[0]

    def _apply(self, fn, recurse: bool = True) -> BitLinear:  # type: ignore[override]
        self._kept = None  # a weight that moves to another device or dtype keeps its version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "keep_trits"} | {"_kept": None}  # copies keep nothing

    def extra_repr(self) -> str:
        kind = f"ternary, block={self.block}{', int8' if self.int8 else ''}" if self.ternary else "float"
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {kind}"


def keep_trits(module: nn.Module, on: bool) -> None:
    """Let every ternary matrix below a module keep its trits until its weight changes, or forget them."""
    for child in module.modules():
        if isinstance(child, BitLinear):
            child.keep_trits, child._kept = on, None


def project(x: Tensor, *linears: BitLinear) -> tuple[Tensor, ...]:
    """Several matrices that read the same activations: these are rounded to int8 once.

    x: (..., in); returns (..., out) for each matrix.
    """
    if all(linear.int8 and linear.ternary for linear in linears):
        quantised = [linear.quantised() for linear in linears]
        trits, scales = map(list, zip(*quantised, strict=True))
        return int8_linear(x, [linear.weight for linear in linears], trits, scales, linears[0].int8_backward)
    h = int8_activation(x, linears[0].activation_scale)
    dtype = product_dtype(h, linears[0].weight.device)
    return tuple(F.linear(h, linear.shipped_weight(dtype)) for linear in linears)
