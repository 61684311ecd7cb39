"""The yardstick: a GPT without anything of ours, as short as torch allows, of the shape of one of our networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model import GPTConfig
from nanochat.model.rotary import apply_rope, rope_table


class Layer(nn.Module):
    """Attention and a gated feed-forward with torch's own modules."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, self.head_dim = config.dim, config.head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(d, eps=config.norm_eps) for _ in range(2))
        self.q, self.o = (nn.Linear(d, d, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(d, config.n_kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(d, config.ffn_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(config.ffn_dim, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)"""
        h = self.norms[0](x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))  # (B, T, H, head_dim)
        q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True, enable_gqa=grouped)
        x = x + self.o(y.transpose(1, 2).flatten(-2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainGPT(nn.Module):
    """Embedding, layers, and a cross entropy over logits that exist whole."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=config.initial_embedding_std)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        for name, table in zip(
            ("cos", "sin"), rope_table(config.seq_len, config.head_dim, config.rope_base), strict=True
        ):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy of (B, T) targets."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]], bf16: bool
) -> None:
    """One optimizer step, unclipped."""
    for batch in batches:
        with torch.autocast(batch["tokens"].device.type, torch.bfloat16, enabled=bf16):
            loss = model(batch["tokens"], batch["targets"])
        (loss / len(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
