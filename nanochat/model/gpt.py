"""The network: embedding, blocks, final norm, and the output matrix that the objectives use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.model.attention import Attention, KeyValueCache
from nanochat.model.autocast import product_dtype, widened
from nanochat.model.checkpointing import Checkpointed, recomputed
from nanochat.model.compact_backward import KeptRows, compact
from nanochat.model.config import GPTConfig
from nanochat.model.feedforward import FeedForward
from nanochat.model.hyper_connections import HyperConnection, expand, reduce
from nanochat.model.low_precision import look_up
from nanochat.model.norm import RMSNorm
from nanochat.model.rotary import rope_table
from nanochat.model.value_embeddings import Lane, make_lane, square_of


class Block(Checkpointed):
    """One layer: attention, then feed-forward, each added to the residual stream (or streams)."""

    def __init__(self, config: GPTConfig, layer: int, value_table: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config, layer, value_table)
        self.feedforward = FeedForward(config)
        self.hyper_attention: HyperConnection | None = None
        self.hyper_feedforward: HyperConnection | None = None
        if config.streams > 1:
            dynamic = config.stream_maps == "dynamic"
            self.hyper_attention = HyperConnection(config.streams, config.dim, 2 * layer, dynamic)
            self.hyper_feedforward = HyperConnection(config.streams, config.dim, 2 * layer + 1, dynamic)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        kept: KeptRows | None = None,
        lane: Lane | None = None,
    ) -> Tensor:
        """x: (B, T, d), or the residual streams (n, B, T, d); kept: tokens on which the backward runs (None: all)."""
        beside = [] if lane is None else [part for part in lane if part is not None]
        square = beside[1:]  # what the norms count of the lane

        def attention(u: Tensor) -> Tensor:
            if kept is None:
                return self.attention(u, cos, sin, cache, lane)

            def rows(u: Tensor, cos: Tensor, sin: Tensor, *beside: Tensor) -> Tensor:
                return self.attention(u, cos, sin, lane=Lane(*beside) if beside else None)

            return compact(rows, kept, u, *(t.expand(u.shape[0], -1, -1) for t in (cos, sin)), *beside)

        def ff_rows(u: Tensor, *square: Tensor) -> Tensor:
            return self.feedforward(u, *square) if kept is None else compact(self.feedforward, kept, u, *square)

        def feedforward(u: Tensor) -> Tensor:
            return recomputed(self.recompute == "feedforward", ff_rows, u, *square)

        if self.hyper_attention is None or self.hyper_feedforward is None:
            x = x + attention(x)  # (B, T, d)
            return x + feedforward(x)
        x = self.hyper_attention(x, attention)  # (n, B, T, d)
        return self.hyper_feedforward(x, feedforward)


def through(
    block: Block,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KeyValueCache | None = None,
    kept: KeptRows | None = None,
    lane: Lane | None = None,
) -> Tensor:
    """`block.forward`, recomputed in the backward pass if the block says so, and compiled if it is."""
    # the compact backward keeps a tape of its own, which a compiled block could not; the hooks that gather a sharded
    # block's weights run all the same
    forward: Callable[..., Tensor] = block if kept is None else block._call_impl  # type: ignore[assignment]
    return recomputed(block.recompute == "block", forward, x, cos, sin, cache, kept, lane)


@torch.no_grad()
def reset_blocks(blocks: nn.Module, config: GPTConfig, generator: torch.Generator | None = None) -> None:
    """Draw the initial weights of one or more blocks, as the table of `GPT.reset_parameters` says."""
    for name, parameter in blocks.named_parameters():
        if "hyper_" in name or ".value." in name:  # which begin with constants of their own
            continue
        if parameter.ndim == 1:
            parameter.fill_(config.qk_gain if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
        elif config.zero_init and name.endswith(("attention.o.weight", "feedforward.down.weight")):
            parameter.zero_()
        else:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


class GPT(nn.Module):
    """A decoder-only language model.

    `hidden` gives what the head reads; the head and the loss live together in `nanochat.objectives`, so that the
    logits of a training batch never exist whole. `logits` is for inference.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        width = config.value_embeddings * config.value_width
        self.value_embedding = nn.Embedding(config.vocab_size, width) if width else None
        self.blocks = nn.ModuleList(Block(config, layer, config.value_table(layer)) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps, width=config.stream_width)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.kept_rows: KeptRows | None = None
        """set by a token filter for a training step: the tokens on which the blocks' backward will run"""
        cos, sin = rope_table(config.seq_len, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the initial weights; with a seed from a generator of its own, else from torch's global one.

        | tensor | distribution |
        |---|---|
        | embedding | N(0, `initial_embedding_std`²) |
        | head | N(0, `head_std`²) |
        | attention output, FFN down | 0, or N(0, 1 / fan-in) without `zero_init` |
        | other matrices | N(0, 1 / fan-in) |
        | norm gains | 1; query and key norms `qk_gain` |
        | value embeddings | N(0, `value_embedding_std`²); their gains `value_gain` |
        """
        if self.embedding.weight.is_meta:
            return
        config = self.config
        generator = None if seed is None else torch.Generator(self.embedding.weight.device).manual_seed(seed)
        self.embedding.weight.normal_(0.0, config.initial_embedding_std, generator=generator)
        if self.head is not None:
            self.head.weight.normal_(0.0, config.head_std, generator=generator)
        reset_blocks(self.blocks, config, generator)
        for module in self.modules():
            if isinstance(module, HyperConnection):
                module.reset_parameters()
        self.norm.weight.fill_(1.0)
        if self.value_embedding is not None:  # last: the other weights are those of the same seed without
            self.value_embedding.weight.normal_(0.0, config.value_embedding_std, generator=generator)
            for block in self.blocks:
                if block.attention.value is not None:  # type: ignore[union-attr]
                    block.attention.value.reset_parameters(config, generator)  # type: ignore[union-attr]

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, d), normalised if the model has an embedding norm."""
        x = look_up(self.embedding, tokens, self.norm.weight.dtype)
        if self.config.embedding_norm:
            x = F.rms_norm(x, (self.config.dim,), eps=self.config.norm_eps)
        return x

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None, start: int | Tensor = 0) -> Tensor:
        """The hidden states after the final norm.

        tokens: (B, T) ids; start: position of the first token (the length of the cache), or one for each row (B,);
        returns (B, T, d). Raises `UserError` when a sequence is longer than the model's.
        """
        return self.trunk(self.embed(tokens), self.lane(tokens), cache, start)

    def lane(self, tokens: Tensor) -> Lane | None:
        """The value embeddings of the tokens (B, T); None where the model has none."""
        if self.value_embedding is None:
            return None
        return make_lane(look_up(self.value_embedding, tokens, self.norm.weight.dtype), self.config)

    def trunk(
        self, x: Tensor, lane: Lane | None = None, cache: KeyValueCache | None = None, start: int | Tensor = 0
    ) -> Tensor:
        """`hidden` from the tokens' embeddings (B, T, d) and their lane, as `embed` and `lane` give them."""
        end = int(start if isinstance(start, int) else start.max()) + x.shape[1]
        if end > self.config.seq_len:
            raise UserError(f"a sequence of {end} tokens is longer than the model's {self.config.seq_len}.")
        if isinstance(start, int):
            cos, sin = self.cos[start:end], self.sin[start:end]  # (T, head_dim / 2)
        else:
            positions = start[:, None] + torch.arange(x.shape[1], device=start.device)  # (B, T)
            cos, sin = self.cos[positions], self.sin[positions]  # (B, T, head_dim / 2)
        if self.config.streams > 1:
            x = expand(x, self.config.streams)  # (n, B, T, d)
        kept = self.kept_rows if torch.is_grad_enabled() else None
        for block in self.blocks:
            x = through(block, x, cos, sin, cache, kept, lane)  # type: ignore[arg-type]
        return self.norm(reduce(x) if self.config.streams > 1 else x, square_of(lane))

    def head_weight(self) -> Tensor:
        """The output matrix (V, d): the embedding table when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., V) in float32, soft-capped if the model is."""
        logits = F.linear(hidden, widened(self.head_weight(), product_dtype(hidden))).float()
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V)."""
        return self.logits(self.hidden(tokens))
