"""Value embeddings (karpathy/nanochat, modded-nanogpt) in a form that stock llama.cpp runs: a lane.

A layer adds a learned vector of the *token* to its attention values: v += gain * VE[token] * s, where s is the factor
by which the layer's norm scales the residual stream. In an exported file the stream is wider by the lane, which holds
VE[token] from the embedding on and which no layer writes to; a layer's value matrix reads it through one-hot rows.
Training computes the compact form, and shares with the file the one thing that the lane changes elsewhere: every norm
divides by the root mean square of stream and lane together, sqrt((|x|² + |VE|²) / (d + lane) + eps).

docs/value-embeddings.md has the algebra.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.bitlinear import int8_activation
from nanochat.model.config import VALUE_GATE_CHANNELS, GPTConfig

GATE_RANGE = 3.0  # of a gate of the input: 3 sigmoid(.)
GATE_START = 0.02  # its weights begin in [0, 0.02)


class Lane(NamedTuple):
    """The value embeddings of a sequence's tokens."""

    values: Tensor
    """(B, T, tables * value_width)"""
    square: Tensor | None = None
    """(B, T, 1): the sum of their squares, which the norms count; None with a gate of the input"""


def make_lane(values: Tensor, config: GPTConfig) -> Lane:
    """The lane of looked-up value embeddings (B, T, tables * value_width)."""
    return Lane(values, values.square().sum(-1, keepdim=True) if config.lane_width else None)


def square_of(lane: Lane | None) -> Tensor | None:
    """What the norms count of a lane, (B, T, 1); None where there is no such thing."""
    return None if lane is None else lane.square


def rounded_gain(gain: Tensor) -> Tensor:
    """Gains as a file holds them: scales of a block, in float16; of the gains' own dtype."""
    return gain.to(torch.float16).to(gain.dtype)


class _RoundedGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gain: Tensor) -> Tensor:
        return rounded_gain(gain)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient


class ValueEmbedding(nn.Module):
    """What one layer adds to its values.

    Args:
        table: which of the lane's tables it reads.
    """

    def __init__(self, config: GPTConfig, table: int) -> None:
        super().__init__()
        self.width, self.start, self.head_dim = config.value_width, table * config.value_width, config.head_dim
        heads = self.width // self.head_dim
        self.gain: nn.Parameter | None = None
        self.gate: nn.Linear | None = None
        if config.value_gate == "static":
            self.gain = nn.Parameter(torch.full((heads,), float(config.value_gain)))
        else:
            self.gate = nn.Linear(VALUE_GATE_CHANNELS, heads, bias=False)

    def shipped_gain(self) -> Tensor:
        """(heads,): `rounded_gain` of the factors, with a straight-through gradient."""
        assert self.gain is not None
        return _RoundedGain.apply(self.gain)  # type: ignore[return-value]

    def forward(self, v: Tensor, x: Tensor, values: Tensor, scale: Tensor | None, int8: str) -> Tensor:
        """Add to the values of the first heads.

        Args:
            v: (B, T, KV, head_dim). x: (B, T, d), the stream. values: (B, T, lane).
            scale: (B, T, 1), the norm's factor; None with a gate of the input.
            int8: how activations are rounded; the lane is rounded in blocks of its own, as ggml does.
        """
        own = values.narrow(-1, self.start, self.width)  # (B, T, width)
        if self.gate is not None:
            gate = GATE_RANGE * torch.sigmoid(F.linear(x.narrow(-1, 0, VALUE_GATE_CHANNELS), self.gate.weight))
            own, factor = own.unflatten(-1, (-1, self.head_dim)), gate.unsqueeze(-1)
        else:
            assert scale is not None
            own = int8_activation(own * scale, "none" if int8 == "none" else "block")
            own, factor = own.unflatten(-1, (-1, self.head_dim)), self.shipped_gain()[:, None]
        added = own * factor  # (B, T, heads, head_dim)
        if added.shape[2] < v.shape[2]:
            added = F.pad(added, (0, 0, 0, v.shape[2] - added.shape[2]))
        return v + added.to(v.dtype)

    @torch.no_grad()
    def reset_parameters(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        """The gain is `value_gain`; a gate's weights are drawn from [0, GATE_START)."""
        if self.gain is not None:
            self.gain.fill_(config.value_gain)
        if self.gate is not None:
            self.gate.weight.uniform_(0.0, GATE_START, generator=generator)
