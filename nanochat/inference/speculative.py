"""Self-speculative decoding: the heads of multi-token prediction draft, the trunk verifies several tokens in one pass.

What comes out is what the trunk alone would write: the same tokens when decoding greedily, tokens of the same
distribution when sampling (Leviathan et al., arXiv:2211.17192).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nanochat.checkpoint import Run
from nanochat.errors import UserError
from nanochat.inference.engine import Cache, Decoder
from nanochat.inference.sampling import Sampling, draw_tokens, probabilities
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
    """tokens written"""
    passes: int = 0
    """forward passes of the trunk that wrote them, without the reading of the prompt"""
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


def heads_of(run: Run) -> list[SequentialHead]:
    """The sequential heads of a run; raises `UserError` when it was trained without."""
    heads = build_heads(run.config, run.objectives, run.gpt.embedding.weight.dtype)
    if not heads:
        raise UserError(
            f"{run.folder} has no heads that could draft: it was trained without +mtp=on (kind sequential). "
            "Leave --speculative out."
        )
    return heads


def accept(truth: Tensor, drafts: Sequence[int], guesses: Sequence[Tensor], generator: torch.Generator) -> list[int]:
    """The drafts that stay, and one token more: all of them are then distributed as if drawn from `truth`.

    A draft stays with the probability truth / guess (at most 1); the first that does not is drawn anew from what the
    truth has beyond the guess.

    truth: (1 + drafts, V), the distribution at each place; guesses: the (V,) that each draft was drawn from.
    """
    accepted = 0
    for draft, guess in zip(drafts, guesses, strict=True):
        share = float(truth[accepted, draft] / guess[draft])
        if share < 1 and float(torch.rand((), generator=generator, dtype=torch.float64)) >= share:
            break
        accepted += 1
    last = truth[accepted]
    if accepted < len(drafts):
        rest = (last - guesses[accepted]).clamp_min(0)
        last = rest if float(rest.sum()) > 0 else last  # equal up to rounding
    return [*drafts[:accepted], int(draw_tokens(last[None], [generator]))]


class _Drafter:
    """One head with its cache. Row t reads the hidden state of token t on the level below, and token t + depth + 1."""

    def __init__(self, head: SequentialHead, depth: int, config: GPTConfig, like: Tensor) -> None:
        self.head, self.depth = head, depth
        self.cache = Cache(replace(config, n_layers=1, value_embeddings=0), 1, config.seq_len, like)
        self.hidden = like.new_zeros(config.seq_len, config.dim)
        """(seq_len, d): what the head made of each row"""

    def advance(self, gpt: GPT, below: Tensor, tokens: Sequence[int], rows: int) -> None:
        """Compute the rows up to `rows` that are not in the cache yet; `below`: (seq_len, d) of the level below."""
        start = self.cache.length
        if start >= rows:
            return
        following = torch.tensor([tokens[start + self.depth + 1 : rows + self.depth + 1]], device=below.device)
        cos, sin, square = gpt.cos[start:rows], gpt.sin[start:rows], square_of(gpt.lane(following))
        made = self.head(below[None, start:rows], gpt.embed(following), cos, sin, self.cache, square=square)
        self.cache.length = rows
        self.hidden[start:rows] = made[0]


class Speculator:
    """Decodes one sequence with drafts.

    Args:
        gpt: best an `inference_copy`.
        heads: of `heads_of` or `build_heads`; as many tokens are drafted for a pass.
        vocab_limit: tokens from this id on are never drawn.
    """

    def __init__(self, gpt: GPT, heads: Sequence[SequentialHead], vocab_limit: int | None = None) -> None:
        if not heads:
            raise UserError("there are no heads of multi-token prediction to draft with.")
        self.gpt, self.heads, self.vocab_limit = gpt, heads, vocab_limit
        self.statistics = Statistics()

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop_id: int | None = None,
    ) -> Iterator[int]:
        """Continue a prompt token by token; as `generate_tokens` does at the end of the context and at `stop_id`."""
        if not prompt:
            raise UserError("a prompt of no tokens cannot be continued: the tokenizer has no document separator.")
        sampling = sampling or Sampling()
        generator = torch.Generator().manual_seed(seed % 2**63)
        limit = self.gpt.config.seq_len
        tokens = list(prompt[-limit:])  # of the context; all but the last are in the caches
        self._reset(tokens)
        written = 0
        while written < max_tokens:
            if self.trunk.length == limit:
                tokens = tokens[-max(1, limit // 2) :]
                self._reset(tokens)
            # nothing is drafted beyond what may be written or what fits
            room = min(len(self.heads), max_tokens - written - 1, limit - len(tokens))
            drafts, guesses = self._draft(tokens, room, sampling, generator)
            new = self._verify(tokens, drafts, guesses, sampling, generator)
            self.statistics.passes += 1
            for token in new:
                if token == stop_id:
                    return
                tokens.append(token)
                written += 1
                self.statistics.tokens += 1
                yield token

    def _reset(self, tokens: Sequence[int]) -> None:
        """Read all tokens but the last."""
        gpt, like = self.gpt, self.gpt.norm.weight
        self.trunk = Decoder(gpt)
        self.hidden = like.new_zeros(gpt.config.seq_len, gpt.config.dim)
        self.drafters = [_Drafter(head, depth, gpt.config, like) for depth, head in enumerate(self.heads)]
        if len(tokens) > 1:
            read = torch.tensor([tokens[:-1]], device=like.device)
            self.hidden[: len(tokens) - 1] = self.trunk.hidden(read)[0]

    def _distribution(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        """(..., d) -> probabilities (..., V)."""
        return probabilities(self.gpt.logits(hidden)[..., : self.vocab_limit], sampling)

    def _draft(
        self, tokens: Sequence[int], count: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], list[Tensor]]:
        """Up to `count` tokens after the last one, and the distributions (V,) that they were drawn from."""
        rows = len(tokens) - 1  # tokens whose hidden state is known
        guess = list(tokens)
        drafts: list[int] = []
        guesses: list[Tensor] = []
        if rows == 0:
            return drafts, guesses
        below = self.hidden
        for drafter in self.drafters[:count]:
            drafter.advance(self.gpt, below, guess, rows)
            below = drafter.hidden
            guesses.append(self._distribution(below[rows - 1], sampling))
            drafts.append(int(draw_tokens(guesses[-1][None], [generator])))
            guess.append(drafts[-1])
        return drafts, guesses

    def _verify(
        self,
        tokens: Sequence[int],
        drafts: Sequence[int],
        guesses: Sequence[Tensor],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> list[int]:
        """One pass of the trunk over the last token and the drafts: the accepted drafts and one token of its own."""
        start = self.trunk.length
        fed = torch.tensor([[tokens[-1], *drafts]], device=self.hidden.device)
        hidden = self.trunk.hidden(fed)[0]  # (1 + drafts, d)
        truth = self._distribution(hidden, sampling)  # (1 + drafts, V)
        new = accept(truth, drafts, guesses, generator)
        accepted = len(new) - 1
        self.statistics.drafted += len(drafts)
        self.statistics.accepted += accepted
        self.trunk.truncate(start + 1 + accepted)
        self.hidden[start : start + 1 + accepted] = hidden[: 1 + accepted]
        for drafter in self.drafters:
            # row t of a head has read token t + depth + 1, which must be one that stays
            valid = start + 1 + accepted - drafter.depth - 1
            drafter.cache.length = max(0, min(drafter.cache.length, valid))
        return new
