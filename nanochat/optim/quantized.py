"""State tensors in 8 bits: blocks of elements share one float32 absolute maximum a.

Codes c are int8 tensors of the shape that they stand for, in -127..127:

| name | value | for |
|---|---|---|
| linear | a c / 127 | Muon's momentum |
| square | a sign(c) (c / 127)^2 | momenta of AdamW and Lion, whose elements differ by orders of magnitude |
| quartic | a ((c + 128) / 255)^4 | second moments; a positive one never becomes 0, which would blow up the step |

Tensors are worked on in spans of whole blocks that stay in a CPU's cache: a whole pass over memory for each elementary
operation would cost three times as much. On a GPU a span is the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.optim.options import switch, whole
from nanochat.optim.rule import Group, State

BLOCK = 2048
SMALL = 4096
"""tensors with fewer elements stay in 32 bits"""
SPAN = 2**17
"""elements worked on at a time on a CPU"""
TINY = 1e-36
"""smaller maxima count as zero: their reciprocals would overflow"""


@dataclass(frozen=True)
class Options8bit:
    """Elements that share one maximum, and whether codes are rounded at random, without a bias."""

    block_size: int = whole(BLOCK, 16, 2**24, saved=True)
    stochastic_rounding: bool = switch(False)


def absmax_like(parameter: Tensor, block: int) -> Tensor:
    """Zeros, one for each block of a parameter: (ceil(numel / block),) float32."""
    return torch.zeros(-(-parameter.numel() // block), dtype=torch.float32, device=parameter.device)


def codes_like(parameter: Tensor) -> Tensor:
    """Codes of zero in the shape of a parameter, int8."""
    return torch.zeros_like(parameter, dtype=torch.int8, memory_format=torch.contiguous_format)


def span_size(x: Tensor, block: int) -> int:
    """Elements of the longest span of a tensor."""
    full = x.numel() // block * block
    return max(min(block, x.numel()), full if x.device.type != "cpu" else min(full, max(SPAN // block, 1) * block))


def spans(x: Tensor, block: int) -> Iterator[tuple[slice, slice]]:
    """(elements, blocks) of a flat tensor: whole blocks, a span at a time, then a partial last block."""
    full, size = x.numel() // block * block, span_size(x, block)
    for start in range(0, full, size):
        end = min(start + size, full)
        yield slice(start, end), slice(start // block, end // block)
    if full < x.numel():
        yield slice(full, x.numel()), slice(full // block, full // block + 1)


def encode(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    code: str,
    generator: torch.Generator | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Quantise one span.

    x: flat float32; codes: flat int8 and absmax: one for each block, both written; generator: round stochastically;
    scratch: like x, overwritten.
    """
    rows = absmax.numel()
    out = torch.empty_like(x) if scratch is None else scratch
    source, blocks = x.view(rows, -1), out.view(rows, -1)
    if code == "quartic":
        torch.amax(source, dim=1, out=absmax)
    else:
        torch.amax(torch.abs(source, out=blocks), dim=1, out=absmax)
    inverse = absmax.clamp_min(TINY).reciprocal_()[:, None]
    if code == "linear":
        torch.mul(source, inverse.mul_(127.0), out=blocks)
    elif code == "square":
        blocks.mul_(inverse).sqrt_().mul_(127.0)
        out.copysign_(x)
    else:
        torch.mul(source, inverse, out=blocks).sqrt_().sqrt_().mul_(255.0)
    if generator is not None:
        out.add_(torch.rand(out.shape, generator=generator, device=out.device)).sub_(0.5)
    out.round_()
    if code == "quartic":
        out.clamp_(1.0, 255.0).sub_(128.0)
    elif generator is not None:
        out.clamp_(-127.0, 127.0)
    codes.copy_(out)


def decode(codes: Tensor, absmax: Tensor, code: str, out: Tensor) -> Tensor:
    """The values of one span, written to `out` (flat float32) and returned."""
    rows = absmax.numel()
    blocks, source = out.view(rows, -1), codes.view(rows, -1)
    if code == "linear":
        return torch.mul(source, (absmax / 127.0)[:, None], out=blocks).view_as(out)
    if code == "square":
        blocks.copy_(source)
        return blocks.mul_(blocks.abs()).mul_((absmax / 127.0**2)[:, None]).view_as(out)
    torch.add(source, 128.0, out=blocks).mul_(1.0 / 255.0)
    return blocks.square_().square_().mul_(absmax[:, None]).view_as(out)


def quantize(x: Tensor, block: int = BLOCK, code: str = "linear") -> tuple[Tensor, Tensor]:
    """(codes int8 in the shape of x, absmax float32 (ceil(numel / block),)) of a float32 tensor."""
    codes, absmax = codes_like(x), absmax_like(x, block)
    store(x, codes, absmax, block, code)
    return codes, absmax


def store(x: Tensor, codes: Tensor, absmax: Tensor, block: int, code: str = "linear") -> None:
    """Quantise a float32 tensor into existing codes and maxima."""
    flat, flat_codes = x.reshape(-1), codes.view(-1)
    for elements, blocks in spans(flat, block):
        encode(flat[elements], flat_codes[elements], absmax[blocks], code)


def dequantize(codes: Tensor, absmax: Tensor, block: int = BLOCK, code: str = "linear") -> Tensor:
    """The float32 tensor that codes stand for."""
    out = torch.empty_like(codes, dtype=torch.float32)
    flat, flat_codes = out.view(-1), codes.view(-1)
    for elements, blocks in spans(flat, block):
        decode(flat_codes[elements], absmax[blocks], code, flat[elements])
    return out


def rounding_generator(step: int, index: int, device: torch.device) -> torch.Generator:
    """Random numbers as a function of (step, parameter), so that a resumed run rounds alike."""
    return torch.Generator(device).manual_seed((step * 1_000_003 + index) % 2**63)


def rounding_of(state: State, group: Group, device: torch.device) -> torch.Generator | None:
    """The generator of a parameter's stochastic rounding at its step; None: round to the nearest."""
    return rounding_generator(state["step"], state["index"], device) if group["stochastic_rounding"] else None
