"""The gated feed-forward sub-layer (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.bitlinear import BitLinear, int8_activation
from nanochat.model.config import GPTConfig
from nanochat.model.norm import RMSNorm


class FeedForward(nn.Module):
    """norm, `down(activation(gate(x)) * up(x))` (no residual)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, hidden = config.dim, config.ffn_dim

        def linear(inputs: int, outputs: int) -> BitLinear:
            return BitLinear(inputs, outputs, config.ternary, config.weight_block)

        self.norm = RMSNorm(d, eps=config.norm_eps, width=config.stream_width)
        self.gate, self.up, self.down = linear(d, hidden), linear(d, hidden), linear(hidden, d)
        self.sub_norm = RMSNorm(hidden, eps=config.norm_eps) if config.sub_norm else None
        self.activation = config.activation
        self.int8 = config.activation_scale if config.ternary else "none"

    def forward(self, x: Tensor, square: Tensor | None = None) -> Tensor:
        """x: (B, T, d), square: (B, T, 1) of the lane, if there is one; returns (B, T, d)."""
        h = int8_activation(self.norm(x, square), self.int8)
        gate = self.gate(h)  # (B, T, ffn_dim)
        gate = F.silu(gate) if self.activation == "silu" else F.relu(gate).square()
        h = gate * self.up(h)
        if self.sub_norm is not None:
            h = self.sub_norm(h)
        return self.down(int8_activation(h, self.int8))
