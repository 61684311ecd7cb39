"""Self-speculative decoding: the heads of multi-token prediction draft, the trunk verifies several tokens in one pass.

A draft stays where it is the token that the trunk's own distribution gives, drawn as without drafts. So a request gets
the same tokens with and without drafts, whatever its sampling and seed. (Rejection sampling, arXiv:2211.17192,
accepts more drafts when sampling and keeps the distribution, but not the tokens of a seed.)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn

from nanochat.errors import UserError
from nanochat.inference.slots import SlotCache, TorchBackend
from nanochat.model.bitlinear import BitLinear
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.value_embeddings import square_of
from nanochat.objectives.mtp import SequentialHead

PREFIX = "mtp.heads."


@dataclass
class Statistics:
    """How much the drafts saved."""

    tokens: int = 0
    """tokens that were written by passes with drafts"""
    passes: int = 0
    """those passes of the trunk"""
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0.0
        rate = self.tokens / self.passes if self.passes else 0.0
        return (
            f"{self.tokens} tokens in {self.passes} passes of the trunk ({rate:.2f} a pass); "
            f"{self.accepted} of {self.drafted} drafts accepted ({100 * share:.0f}%)"
        )


@torch.no_grad()
def build_heads(config: GPTConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> list[SequentialHead]:
    """Sequential heads for inference, ternary matrices de-quantised once.

    parameters: by names that begin with `mtp.heads.`, as `Run.objectives` has them; returns none when there are none.
    """
    heads = []
    while own := {
        name.removeprefix(f"{PREFIX}{len(heads)}."): tensor
        for name, tensor in parameters.items()
        if name.startswith(f"{PREFIX}{len(heads)}.")
    }:
        with torch.device("meta"):
            head = SequentialHead(config)
        try:
            head.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise UserError("the heads of multi-token prediction are not sequential ones, which can draft.") from error
        for module in head.modules():
            if isinstance(module, BitLinear):
                module.weight = nn.Parameter(module.shipped_weight(), requires_grad=False)
                module.ternary = False
        heads.append(head.to(dtype).requires_grad_(False).eval())
    return heads


class Drafter:
    """Drafts for the slots of one network.

    Row t of a head reads the hidden state of token t on the level below, and token t + depth + 1. What it made of a row
    is kept, with the head's keys and values, as long as the tokens that it has read stay.

    Args:
        gpt: the network, best an `inference_copy`.
        heads: of `build_heads`; as many tokens are drafted for a pass.
        slots, context: of the backend that it works for.
        vocab_limit: tokens from this id on are never drafted.

    Raises `UserError` when its caches do not fit in memory.
    """

    def __init__(
        self, gpt: GPT, heads: Sequence[SequentialHead], slots: int, context: int, vocab_limit: int | None = None
    ) -> None:
        self.gpt, self.heads, self.vocab_limit = gpt, heads, vocab_limit
        like, config = gpt.norm.weight, replace(gpt.config, n_layers=1, value_embeddings=0)
        self.caches = [SlotCache(config, slots, context, like) for _ in heads]
        self.hidden = like.new_zeros(1 + len(heads), slots, context, gpt.config.dim)
        """what the trunk, and each head, made of each token"""
        self.lengths = [[0] * slots for _ in heads]
        """rows of each head that are in its cache"""
        self.seen: list[list[int]] = [[] for _ in range(slots)]
        """tokens of each slot when they were drafted for last, drafts included"""

    def note(self, slot: int, start: int, hidden: Tensor) -> None:
        """Keep the trunk's hidden states (T, d) of the tokens from `start` on."""
        self.hidden[0, slot, start : start + len(hidden)] = hidden

    @torch.inference_mode()
    def draft(self, slot: int, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens after the tokens of a slot, of which the trunk has read all but the last."""
        rows, guess = len(tokens) - 1, list(tokens)
        if rows == 0:
            return []
        same = common(self.seen[slot], tokens)
        for depth, lengths in enumerate(self.lengths):
            # row t has read token t + depth + 1, which must be one that stays
            lengths[slot] = min(lengths[slot], max(0, same - depth - 1))
        for depth, head in enumerate(self.heads[:count]):
            start = self.lengths[depth][slot]
            if start < rows:
                self._advance(depth, head, slot, guess, start, rows)
            self.lengths[depth][slot] = rows
            logits = self.gpt.logits(self.hidden[depth + 1, slot, rows - 1])[: self.vocab_limit]
            guess.append(int(logits.argmax()))
        self.seen[slot] = guess
        return guess[len(tokens) :]

    def _advance(
        self, depth: int, head: SequentialHead, slot: int, tokens: Sequence[int], start: int, rows: int
    ) -> None:
        """Compute the rows of a head from `start` up to `rows`."""
        gpt, cache = self.gpt, self.caches[depth]
        following = torch.tensor([tokens[start + depth + 1 : rows + depth + 1]], device=self.hidden.device)
        cache.rows, cache.starts = [slot], [start]
        below, square = self.hidden[depth, slot, start:rows], square_of(gpt.lane(following))
        made = head(below[None], gpt.embed(following), gpt.cos[start:rows], gpt.sin[start:rows], cache, square=square)
        self.hidden[depth + 1, slot, start:rows] = made[0]


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens with which both begin."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def drafting_backend(
    gpt: GPT,
    heads: Sequence[SequentialHead],
    slots: int,
    context: int,
    vocab_limit: int | None = None,
    *,
    measured: bool = True,
) -> TorchBackend:
    """A backend with a drafter.

    measured: find out what a pass with drafts costs here, so that requests whose drafts are too rarely right go on
    without, and nothing is drafted where it could not pay. What is written does not depend on it.
    """
    backend = TorchBackend(gpt, slots, context, vocab_limit, Drafter(gpt, heads, slots, context, vocab_limit))
    if measured:
        backend.draft_cost = relative_cost(backend)
        if backend.draft_cost >= 1 + len(heads):
            backend.drafter, backend.drafts = None, 0
    return backend


def relative_cost(backend: TorchBackend, length: int = 32, repeats: int = 7) -> float:
    """What a pass with drafts takes, as a multiple of one without: the median of alternating trials after `length`
    tokens; 0 where the context is too short to try.
    """
    drafts = backend.drafts
    length = min(length, backend.context - 1 - drafts)
    if length < 1:
        return 0.0
    backend.prefill(0, 0, [0] * length)
    ratios = []
    for trial in range(1 + repeats):
        start = time.perf_counter()
        backend.decode([0], [length], [0])
        plain = time.perf_counter()
        # another last token each time, so that every head has a row to compute
        fed = [0] * length + [trial % backend.vocab_size]
        fed += backend.draft(0, fed, drafts)
        count = len(fed) - length
        backend.decode([0] * count, list(range(length, len(fed))), fed[length:])
        ratios.append((time.perf_counter() - plain) / (plain - start))
    return median(ratios[1:])  # the first pass allocates
