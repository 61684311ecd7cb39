"""Rotary position embedding, half-split pairing (RoFormer, arXiv:2104.09864; the "NeoX" order of llama.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.model.rows import row_function


def rope_table(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i / head_dim): two (length, head_dim / 2) float32 tensors.

    The angles are taken in float64, so that position 4095 is as exact as position 1.
    """
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # (length, head_dim / 2)
    return angle.cos().float(), angle.sin().float()


@row_function()
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn element i with element i + head_dim / 2.

    x: (..., T, H, head_dim); cos, sin: (..., T, head_dim / 2), the rows of the table at x's positions.
    """
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (..., T, 1, head_dim / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
