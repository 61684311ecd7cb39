"""Sequences of different lengths in one network: each has a slot of the KV cache.

`Backend` is what the scheduler drives; `TorchBackend` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.device import available_memory
from nanochat.errors import UserError
from nanochat.model.attention import causal_attention
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

if TYPE_CHECKING:
    from nanochat.inference.speculative import Drafter


class Backend(Protocol):
    """A network that holds several sequences. Not thread-safe: one thread drives it."""

    name: str
    slots: int
    """sequences that it holds at once"""
    context: int
    """tokens that each of them may have"""
    vocab_size: int
    drafts: int
    """tokens that `draft` gives at most"""
    draft_cost: float
    """what a pass with drafts takes, as a multiple of one without; 0 where it does not matter"""

    def prefill(self, slot: int, start: int, tokens: Sequence[int], everything: bool = False) -> Tensor:
        """Append tokens to a slot that has `start`; logits after the last one (1, V), or after each (T, V), float32."""
        ...

    def decode(self, slots: Sequence[int], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append one token to each of several slots that have `starts`; logits (B, V), float32.

        A slot may come several times, with successive starts: each of its tokens then sees those before it.
        """
        ...

    def truncate(self, slot: int, length: int) -> bool:
        """Forget all but the first `length` tokens of a slot; False where only all of them can be, as they are then."""
        ...

    def draft(self, slot: int, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` guesses of what follows the tokens of a slot, of which it holds all but the last."""
        ...

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Mean of the final hidden states of a text of its own (d,); raises `UserError` where that cannot be had."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class SlotCache:
    """Keys and values of every layer for each slot (`nanochat.model.attention.KeyValueCache`).

    `rows` says which slot each row of the next pass belongs to; rows beyond them are padding. `starts` has the
    tokens that each of those slots holds already.
    """

    def __init__(self, config: GPTConfig, slots: int, capacity: int, like: Tensor) -> None:
        shape = (config.n_layers, slots, capacity, config.n_kv_heads, config.head_dim)
        check_memory(2 * torch.Size(shape).numel() * like.element_size(), like.device)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.rows: Sequence[int] = ()
        self.starts: Sequence[int] = ()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each row attends to the keys of its slot alone, exactly as it would without the others."""
        y = torch.zeros_like(q)
        for row, (slot, start) in enumerate(zip(self.rows, self.starts, strict=True)):
            end = start + k.shape[1]
            keys, values = self.keys[layer, slot : slot + 1, :end], self.values[layer, slot : slot + 1, :end]
            keys[:, start:], values[:, start:] = k[row], v[row]
            y[row] = causal_attention(q[row : row + 1], keys, values)[0]
        return y


class TorchBackend:
    """A GPT of ours with slots.

    Args:
        gpt: best an `inference_copy`.
        slots: sequences at once.
        context: tokens of each; None takes the model's `seq_len`.
        vocab_limit: logits beyond it are left out (a model's vocabulary can be wider than its tokenizer's).
        drafter: made for as many slots and tokens.
        rows: of a pass of single tokens, at least; None finds the fewest that give each sequence what it gets beside
            all others.

    Raises `UserError` when the cache does not fit in memory.
    """

    name = "torch"

    def __init__(
        self,
        gpt: GPT,
        slots: int = 1,
        context: int | None = None,
        vocab_limit: int | None = None,
        drafter: Drafter | None = None,
        rows: int | None = None,
    ) -> None:
        self.gpt, self.slots, self.drafter = gpt, slots, drafter
        self.drafts, self.draft_cost = len(drafter.heads) if drafter else 0, 0.0
        self.context = min(context or gpt.config.seq_len, gpt.config.seq_len)
        self.vocab_size = min(vocab_limit or gpt.config.vocab_size, gpt.config.vocab_size)
        self.device = gpt.embedding.weight.device
        self.cache = SlotCache(gpt.config, slots, self.context, gpt.norm.weight)
        self.rows = steady_rows(gpt, max(slots, 1 + self.drafts)) if rows is None else rows

    @torch.inference_mode()
    def _hidden(self, tokens: Tensor, slots: Sequence[int], starts: Sequence[int], positions: int | Tensor) -> Tensor:
        self.cache.rows, self.cache.starts = slots, starts
        hidden = self.gpt.hidden(tokens, self.cache, positions)
        if self.drafter is not None:
            for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
                self.drafter.note(slot, start, hidden[row])
        return hidden

    @torch.inference_mode()
    def prefill(self, slot: int, start: int, tokens: Sequence[int], everything: bool = False) -> Tensor:
        hidden = self._hidden(torch.tensor([tokens], device=self.device), [slot], [start], start)[0]  # (T, d)
        return self.gpt.logits(hidden if everything else hidden[-1:])[:, : self.vocab_size]

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], starts: Sequence[int], tokens: Sequence[int]) -> Tensor:
        count = len(slots)
        padding = [0] * (max(self.rows, count) - count)
        fed = torch.tensor([*tokens, *padding], device=self.device)[:, None]  # (B, 1)
        positions = torch.tensor([*starts, *padding], device=self.device)  # (B,)
        hidden = self._hidden(fed, slots, starts, positions)[:, 0]  # (B, d)
        return self.gpt.logits(hidden)[:count, : self.vocab_size]

    def truncate(self, slot: int, length: int) -> bool:
        return True  # the caller says with each pass how many tokens a slot has

    def draft(self, slot: int, tokens: Sequence[int], count: int) -> list[int]:
        return self.drafter.draft(slot, tokens, count) if self.drafter else []

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        return self.gpt.hidden(torch.tensor([tokens], device=self.device))[0].float().mean(0)

    def close(self) -> None:
        self.cache.keys = self.cache.values = torch.empty(0)
        self.drafter = None


@torch.inference_mode()
def steady_rows(gpt: GPT, slots: int) -> int:
    """The fewest rows with which this machine multiplies each row as it does among `slots` rows, to the last bit.

    With few rows a matrix product may take another path, which rounds otherwise; an answer would then depend on who
    is beside it. Found by trying on every shape of matrix that the network has.
    """
    if slots == 1:
        return 1
    matrices = {tuple(p.shape): p for p in gpt.parameters() if p.ndim == 2}
    rows = [1, *(count for count in (2, 4, 8, 16, 32) if count < slots)]
    for weight in [*matrices.values(), gpt.head_weight()]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(slots, weight.shape[1], generator=generator).to(weight)
        whole = F.linear(x, weight)
        while rows and not all(
            torch.equal(F.linear(x[:count], weight), whole[:count]) for count in _tried(rows[0], slots)
        ):
            rows.pop(0)
    return rows[0] if rows else slots


def _tried(least: int, most: int) -> list[int]:
    """Every number of rows up to twice the least, and those around its multiples by powers of two below `most`."""
    tried = set(range(least, 2 * least))
    edge = 2 * least
    while edge < most:
        tried |= {edge, edge + 1}
        edge *= 2
    return sorted(count for count in tried if count < most)


def check_memory(size: int, device: torch.device) -> None:
    """Raises `UserError` when a KV cache of `size` bytes is more than the machine has free (CPUs on Linux)."""
    free = available_memory() if device.type == "cpu" else None
    if free is not None and size > free:
        raise UserError(
            f"the KV cache would take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "use fewer slots (--parallel) or a shorter context (--context)."
        )
