"""The gated feed-forward sub-layer (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.bitlinear import BitLinear, project
from nanochat.model.config import GPTConfig
from nanochat.model.norm import RMSNorm


class FeedForward(nn.Module):
    """norm, `down(activation(gate(x)) * up(x))` (no residual)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, hidden = config.dim, config.ffn_dim

        self.norm = RMSNorm(d, eps=config.norm_eps, width=config.stream_width)
        self.gate, self.up = BitLinear(d, hidden, config), BitLinear(d, hidden, config)
        self.down = BitLinear(hidden, d, config)
        self.sub_norm = RMSNorm(hidden, eps=config.norm_eps) if config.sub_norm else None
        self.activation = config.activation

    def forward(self, x: Tensor, square: Tensor | None = None) -> Tensor:
        """x: (B, T, d), square: (B, T, 1) of the lane, if there is one; returns (B, T, d)."""
        gate, up = project(self.norm(x, square), self.gate, self.up)  # (B, T, ffn_dim) each
        gate = F.silu(gate) if self.activation == "silu" else F.relu(gate).square()
        h = gate * up
        if self.sub_norm is not None:
            h = self.sub_norm(h)
        return self.down(h)
