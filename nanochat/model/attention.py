"""Causal self-attention with grouped key/value heads, a norm per head, and RoPE."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.bitlinear import BitLinear, int8_activation
from nanochat.model.compact_backward import KeptRows, row_function
from nanochat.model.config import GPTConfig
from nanochat.model.norm import RMSNorm
from nanochat.model.rotary import apply_rope

QUERY_BLOCK = 128  # kept queries at a time: their scores stay in the cache, and keys after the last of them are skipped


class KeyValueCache(Protocol):
    """What attention needs of a cache while decoding."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v (B, T, n_kv_heads, head_dim) of a layer, and attend to all of them so far.

        q: (B, T, n_heads, head_dim); returns (B, T, n_heads, head_dim). Rows may be of different lengths.
        """
        ...


def _kept_attention_backward(
    kept: KeptRows, gradient: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `causal_attention` at the kept tokens, from those of the kept queries.

    gradient, q: (B, K, H, head_dim) of the kept tokens; k, v: (B, T, KV, head_dim) of all; returns the gradients of q,
    k and v at the kept tokens. The scores are computed again, a block of queries at a time.
    """
    batch, count, _, head_dim = q.shape
    length, groups = k.shape[1], k.shape[2]
    if kept.positions is None:
        positions = torch.arange(length, device=q.device).expand(batch, length)
    else:
        positions = kept.positions  # (B, K)
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype

    def by_group(x: Tensor) -> Tensor:  # (B, S, n, head_dim) -> (B, KV, n / KV, S, head_dim)
        return x.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)

    q, gradient = by_group(q) * head_dim**-0.5, by_group(gradient)
    k, v = (by_group(t).reshape(batch * groups, length, head_dim) for t in (k, v))
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(dtype, torch.float32)) for t in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, count, QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, count))
            # the furthest key that a query of this block sees; asking a GPU would stop it
            seen = int(positions[:, rows].max()) + 1 if q.device.type == "cpu" else length
            future = torch.arange(seen, device=q.device) > positions[:, rows, None]  # (B, R, S)
            qb, gb = (t[:, :, :, rows].reshape(batch * groups, -1, head_dim) for t in (q, gradient))  # (B KV, G R, hd)
            kb, vb = k[:, :seen], v[:, :seen]
            scores = torch.bmm(qb, kb.mT)  # (B KV, G R, S)
            scores.view(batch, -1, rows.stop - start, seen).masked_fill_(future[:, None], -torch.inf)
            p = torch.softmax(scores, -1)
            dv[:, :seen] += torch.bmm(p.mT, gb)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(gb, vb.mT), p, -1, dtype)
            dk[:, :seen] += torch.bmm(ds.mT, qb)
            dq[:, :, :, rows] = torch.bmm(ds, kb).view(batch, groups, -1, rows.stop - start, head_dim)
    dq = dq.mul_(head_dim**-0.5).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, K, H, head_dim)
    dk, dv = (kept.gather(t.view(batch, groups, length, head_dim).transpose(1, 2)) for t in (dk, dv))
    return dq, dk, dv


@row_function(backward=_kept_attention_backward, kept=(0,), full=(1, 2))
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

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d, head_dim = config.dim, config.head_dim

        def linear(inputs: int, outputs: int) -> BitLinear:
            return BitLinear(inputs, outputs, config.ternary, config.weight_block)

        self.norm = RMSNorm(d, eps=config.norm_eps)
        self.q = linear(d, config.n_heads * head_dim)
        self.k = linear(d, config.n_kv_heads * head_dim)
        self.v = linear(d, config.n_kv_heads * head_dim)
        self.o = linear(config.n_heads * head_dim, d)
        self.q_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.sub_norm = RMSNorm(d, eps=config.norm_eps) if config.sub_norm else None
        self.int8 = config.activation_scale if config.ternary else "none"

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """x: (B, T, d), cos and sin: ([B,] T, head_dim / 2) at x's positions; returns (B, T, d)."""
        head_dim = self.config.head_dim
        h = int8_activation(self.norm(x), self.int8)  # (B, T, d)
        q = self.q(h).unflatten(-1, (-1, head_dim))  # (B, T, H, head_dim)
        k = self.k(h).unflatten(-1, (-1, head_dim))  # (B, T, KV, head_dim)
        v = self.v(h).unflatten(-1, (-1, head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        y = causal_attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        y = y.flatten(-2)  # (B, T, d)
        if self.sub_norm is not None:
            y = self.sub_norm(y)
        return self.o(int8_activation(y, self.int8))
