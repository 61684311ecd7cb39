"""Causal self-attention with grouped key/value heads, a norm per head, and RoPE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from nanochat.model.autocast import product_dtype
from nanochat.model.bitlinear import BitLinear, project
from nanochat.model.config import GPTConfig
from nanochat.model.norm import RMSNorm
from nanochat.model.rotary import apply_rope
from nanochat.model.value_embeddings import Lane, ValueEmbedding

QUERY_BLOCK = 128  # queries at a time in plain products: their scores stay in the cache
KEEP_LENGTH = 512  # longest sequence whose probabilities wait for the backward; of longer ones they are computed again


class KeyValueCache(Protocol):
    """What attention needs of a cache while decoding."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v (B, T, n_kv_heads, head_dim) of a layer, and attend to all of them so far.

        q: (B, T, n_heads, head_dim); returns (B, T, n_heads, head_dim). Rows may be of different lengths.
        """
        ...


def _by_group(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, S, n, head_dim) -> (B KV, n / KV, S, head_dim)"""
    return x.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _probabilities(q: Tensor, k: Tensor, rows: slice, positions: Tensor | None) -> Tensor:
    """Softmax of some queries over the keys up to the furthest that any of them sees.

    q: (B KV, G, R, head_dim), scaled; k: (B KV, S, head_dim); positions: (B, K) of all queries, of which `rows` are
    these, or None where query i is token i. Returns (B KV, G R, seen).
    """
    if positions is None:
        seen = rows.stop
    else:  # on a GPU `.max()` would force a host sync
        seen = min(int(positions[:, rows].max()) + 1, k.shape[1]) if q.device.type == "cpu" else k.shape[1]
    scores = torch.bmm(q.flatten(1, 2), k[:, :seen].mT)
    count = rows.stop - rows.start
    if positions is None:
        future = torch.ones(count, count, dtype=torch.bool, device=q.device).triu_(1)
        scores.view(-1, count, seen)[..., rows.start :].masked_fill_(future, -torch.inf)
    else:
        future = torch.arange(seen, device=q.device) > positions[:, rows, None]  # (B, R, S)
        scores.view(positions.shape[0], -1, count, seen).masked_fill_(future[:, None], -torch.inf)
    return torch.softmax(scores, -1)


def _query_blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + QUERY_BLOCK, count)) for start in range(0, count, QUERY_BLOCK))


def attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None = None,
    probabilities: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of causal attention, a block of queries at a time.

    gradient, q: (B, K, H, head_dim) of the queries at `positions` (B, K; None: of all tokens); k, v:
    (B, T, KV, head_dim); probabilities: of every block, or none, and then they are computed again. Returns the
    gradients of q, k and v, in the shapes of these.
    """
    batch, count, _, head_dim = q.shape
    length, groups = k.shape[1], k.shape[2]
    dtype = product_dtype(q)
    q, gradient = _by_group(q, groups, dtype) * head_dim**-0.5, _by_group(gradient, groups, dtype)
    k, v = (_by_group(t, groups, dtype)[:, 0] for t in (k, v))
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(dtype, torch.float32)) for t in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        for index, rows in enumerate(_query_blocks(count)):
            qb, gb = q[:, :, rows], gradient[:, :, rows].flatten(1, 2)
            p = probabilities[index] if probabilities else _probabilities(qb, k, rows, positions)
            seen, qb = p.shape[-1], qb.flatten(1, 2)
            dv[:, :seen] += torch.bmm(p.mT, gb)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(gb, v[:, :seen].mT), p, -1, dtype)
            dk[:, :seen] += torch.bmm(ds.mT, qb)
            dq[:, :, rows] = torch.bmm(ds, k[:, :seen]).unflatten(1, (-1, rows.stop - rows.start))
    dq = dq.mul_(head_dim**-0.5).unflatten(0, (batch, groups)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, K, H, hd)
    dk, dv = (t.view(batch, groups, length, head_dim).transpose(1, 2) for t in (dk, dv))
    return dq, dk, dv


class _PlainAttention(torch.autograd.Function):
    """Causal attention as plain matrix products, QUERY_BLOCK queries at a time; keys after a block are skipped."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> Tensor:
        batch, length, heads, head_dim = q.shape
        groups, dtype = k.shape[2], product_dtype(q)
        kept = []
        scaled = _by_group(q, groups, dtype) * head_dim**-0.5  # (B KV, G, T, head_dim)
        keys, values = (_by_group(t, groups, dtype)[:, 0] for t in (k, v))  # (B KV, T, head_dim)
        y = torch.empty_like(scaled)
        with torch.autocast(q.device.type, enabled=False):
            for rows in _query_blocks(length):
                p = _probabilities(scaled[:, :, rows], keys, rows, None)
                y[:, :, rows] = torch.bmm(p, values[:, : rows.stop]).unflatten(1, (-1, rows.stop - rows.start))
                if keep:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return y.unflatten(0, (batch, groups)).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        gradients = attention_backward(gradient, q, k, v, None, kept)
        return *(g.to(t.dtype) for g, t in zip(gradients, (q, k, v), strict=True)), None


@wrap_torch_function(lambda q, k, v: (q, k, v))
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in which query i of T sees the keys up to S - T + i.

    q: (B, T, H, head_dim); k, v: (B, S, KV, head_dim) with S >= T; returns (B, T, H, head_dim).
    """
    length, total = q.shape[1], k.shape[1]
    if length == total > 1 and q.device.type == "cpu" and product_dtype(q) == torch.bfloat16:
        # torch's kernel for the CPU takes 2.5 to 2.9 times as long in bfloat16; in float32 they tie
        return _PlainAttention.apply(q, k, v, length <= KEEP_LENGTH and torch.is_grad_enabled())  # type: ignore[return-value]
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

        self.norm = RMSNorm(d, eps=config.norm_eps, width=config.stream_width)
        self.q = BitLinear(d, config.n_heads * head_dim, config)
        self.k = BitLinear(d, config.n_kv_heads * head_dim, config)
        self.v = BitLinear(d, config.n_kv_heads * head_dim, config)
        self.o = BitLinear(config.n_heads * head_dim, d, config)
        self.q_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.sub_norm = RMSNorm(d, eps=config.norm_eps) if config.sub_norm else None
        self.value = None if value_table is None else ValueEmbedding(config, value_table)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KeyValueCache | None = None, lane: Lane | None = None
    ) -> Tensor:
        """x: (B, T, d), cos and sin: ([B,] T, head_dim / 2) at x's positions; returns (B, T, d)."""
        head_dim = self.config.head_dim
        scale: Tensor | None = None
        if lane is None or lane.square is None:
            h = self.norm(x)
        else:
            h, scale = self.norm.with_scale(x, lane.square)
        # (B, T, H, head_dim), and twice (B, T, KV, head_dim)
        q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in project(h, self.q, self.k, self.v))
        if self.value is not None and lane is not None:
            v = self.value(v, x, lane.values, scale, self.v.activation_scale)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        y = causal_attention(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        y = y.flatten(-2)  # (B, T, d)
        if self.sub_norm is not None:
            y = self.sub_norm(y)
        return self.o(y)
