"""Causal self-attention with grouped key/value heads, a norm per head, and RoPE."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from nanochat.model.bitlinear import BitLinear, int8_activation
from nanochat.model.config import GPTConfig
from nanochat.model.norm import RMSNorm
from nanochat.model.rotary import apply_rope
from nanochat.model.value_embeddings import Lane, ValueEmbedding


class KeyValueCache(Protocol):
    """What attention needs of a cache while decoding."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, T, n_kv_heads, head_dim) of a layer and return all of them so far (B, S, ...)."""
        ...


@wrap_torch_function(lambda q, k, v: (q, k, v))
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in which query i of T sees the keys up to S - T + i.

    q: (B, T, H, head_dim); k, v: (B, S, KV, head_dim) with S >= T; returns (B, T, H, head_dim).
    """
    length, total = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, head_dim)
    grouped = q.shape[1] != k.shape[1]
    if length == total:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif length == 1:
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    else:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.transpose(1, 2)


class Attention(nn.Module):
    """The attention sub-layer: norm, q/k/v, head norms, RoPE, attention, output projection (no residual)."""

    def __init__(self, config: GPTConfig, layer: int, value_table: int | None = None) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d, head_dim = config.dim, config.head_dim

        def linear(inputs: int, outputs: int) -> BitLinear:
            return BitLinear(inputs, outputs, config.ternary, config.weight_block)

        self.norm = RMSNorm(d, eps=config.norm_eps, width=config.stream_width)
        self.q = linear(d, config.n_heads * head_dim)
        self.k = linear(d, config.n_kv_heads * head_dim)
        self.v = linear(d, config.n_kv_heads * head_dim)
        self.o = linear(config.n_heads * head_dim, d)
        self.q_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.sub_norm = RMSNorm(d, eps=config.norm_eps) if config.sub_norm else None
        self.value = None if value_table is None else ValueEmbedding(config, value_table)
        self.int8 = config.activation_scale if config.ternary else "none"

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None = None, lane: Lane | None = None
    ) -> Tensor:
        """x: (B, T, d), cos and sin: (T, head_dim / 2) at x's positions; returns (B, T, d)."""
        head_dim = self.config.head_dim
        scale: Tensor | None = None
        if lane is None or lane.square is None:
            h = self.norm(x)
        else:
            h, scale = self.norm.with_scale(x, lane.square)
        h = int8_activation(h, self.int8)  # (B, T, d)
        q = self.q(h).unflatten(-1, (-1, head_dim))  # (B, T, H, head_dim)
        k = self.k(h).unflatten(-1, (-1, head_dim))  # (B, T, KV, head_dim)
        v = self.v(h).unflatten(-1, (-1, head_dim))
        if self.value is not None and lane is not None:
            v = self.value(v, x, lane.values, scale, self.int8)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = causal_attention(q, k, v).flatten(-2)  # (B, T, d)
        if self.sub_norm is not None:
            y = self.sub_norm(y)
        return self.o(int8_activation(y, self.int8))
