"""Multi-token prediction: at token t also predict t+2, t+3, ... (Gloeckle et al., arXiv:2404.19737).

The extra terms share the output matrix and cost little, because each is computed on a fraction of the positions: a
fixed count, drawn anew for every micro-batch. The estimate is unbiased: the mean over all draws is the full loss, and
that of the gradients the full gradient. Nothing is predicted across the beginning of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import ranks
from nanochat.errors import ConfigError
from nanochat.model import GPTConfig
from nanochat.model.attention import KeyValueCache
from nanochat.model.bitlinear import BitLinear
from nanochat.model.compact_backward import KeptRows
from nanochat.model.gpt import Block, reset_blocks, through
from nanochat.model.norm import RMSNorm
from nanochat.model.value_embeddings import square_of
from nanochat.objectives.linear_cross_entropy import IGNORED, linear_cross_entropy
from nanochat.objectives.sampling import draw_positions, generator
from nanochat.objectives.step import Objective, Step

KINDS = ("sequential", "weights-only", "parallel")
SCHEDULES = ("constant", "deepseek", "reverse")
DECAY = 0.5  # weight of a token against the one before it

# shares of the positions at which a term costs about a tenth of nano-125m's step (`nanochat bench mtp`)
DEFAULT_FRACTION = {"sequential": 0.25, "weights-only": 0.1, "parallel": 0.1}
DEFAULT_SCHEDULE = {"sequential": "constant", "weights-only": "reverse", "parallel": "constant"}


class SequentialHead(nn.Module):
    """DeepSeek-V3's module (arXiv:2412.19437, 2.2): one more block, fed with the next token's embedding.

    `norm(block(eh_proj . [embedding_norm(E[token t+1]) ; hidden_norm(h_t)]))`; the result takes the place of h_t in
    front of the shared output matrix, or of the next such module. This is the head that llama.cpp knows as `nextn`.
    """

    def __init__(self, config: GPTConfig, source: torch.Generator | None = None) -> None:
        super().__init__()
        # a head is a plain block whatever the trunk's residual streams are
        config = replace(config, streams=1)
        # no layer of the head reads value embeddings, but in a file its stream is as wide as the trunk's
        d, norm = config.dim, {"eps": config.norm_eps, "width": config.stream_width}
        self.embedding_norm = RMSNorm(d, **norm)
        self.hidden_norm = RMSNorm(d, **norm)
        self.eh_proj = BitLinear(2 * d, d, config)
        self.block = Block(config, layer=0)
        self.norm = RMSNorm(d, **norm)
        self.config = config
        if not self.eh_proj.weight.is_meta:
            nn.init.normal_(self.eh_proj.weight, 0.0, (2 * d) ** -0.5, generator=source)
            reset_blocks(self.block, config, source)

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KeyValueCache | None = None,
        kept: KeptRows | None = None,
        square: Tensor | None = None,
    ) -> Tensor:
        """hidden, embedded: (B, T, d), of token t and of token t + 1; returns (B, T, d), after the module's norm.

        square: (B, T, 1), of the lane of token t + 1.
        """
        x = torch.cat((self.embedding_norm(embedded, square), self.hidden_norm(hidden)), dim=-1)  # (B, T, 2d)
        x = self.eh_proj(x)
        return self.norm(through(self.block, x, cos, sin, cache, kept))


class ParallelHead(nn.Module):
    """`h + silu(proj . norm(h))`, in front of the shared output matrix (Medusa's head, arXiv:2401.10774)."""

    def __init__(self, config: GPTConfig, source: torch.Generator | None = None) -> None:
        super().__init__()
        d = config.dim
        self.norm = RMSNorm(d, eps=config.norm_eps)
        self.proj = BitLinear(d, d, config)
        if self.proj.weight.is_meta:
            return
        if config.zero_init:
            nn.init.zeros_(self.proj.weight)  # at the start it says what the next-token head says
        else:
            nn.init.normal_(self.proj.weight, 0.0, d**-0.5, generator=source)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., d) -> (..., d)
        return hidden + F.silu(self.proj(self.norm(hidden)))


class MultiTokenPrediction(Objective):
    """The loss of `tokens` further tokens, token t + 1 + i with weight 0.5^i, all together `weight`.

    Args:
        kind: `sequential` (DeepSeek-V3's modules, chained; they draft for speculative decoding), `weights-only` (no
            parameters: the next-token logits against the later tokens) or `parallel` (a light head for each token).
        tokens: how many tokens beyond the next one.
        weight: weight of all terms together; 0 computes nothing at all.
        schedule: factor on the weight over the run. `constant`; `deepseek`: 1, then 1/3 after two thirds; `reverse`:
            the farthest token first, each fades linearly to zero, and the last part of the run is plain next-token
            training. None: constant, and reverse for `weights-only`.
        token_fraction: share of the positions on which a term is computed, in (0, 1]; whole sequences (at least one
            of a micro-batch) for `sequential`. None: what costs about a tenth of nano-125m's step.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int = 0,
        kind: str = "sequential",
        tokens: int = 1,
        weight: float = 0.2,
        schedule: str | None = None,
        token_fraction: float | None = None,
    ) -> None:
        super().__init__()
        problems = list(_problems(config, kind, tokens, weight, schedule, token_fraction))
        if problems:
            raise ConfigError(problems)
        self.kind, self.tokens, self.weight = kind, tokens, float(weight)
        self.schedule = schedule or DEFAULT_SCHEDULE[kind]
        self.fraction = float(token_fraction or DEFAULT_FRACTION[kind])
        self.softcap, self.seed = config.softcap, seed
        source = generator(seed, "mtp weights")
        make = {"sequential": SequentialHead, "parallel": ParallelHead}.get(kind)
        self.heads = nn.ModuleList(make(config, source) for _ in range(tokens)) if make else nn.ModuleList()

    def describe(self) -> str:
        """For a run's header and card; empty where the weight switches it off."""
        tokens = f"{self.tokens} further token{'s' if self.tokens > 1 else ''}"
        return f"MTP ({self.kind}, {tokens})" if self.weight else ""

    def blocks(self) -> Iterable[nn.Module]:
        return self.heads

    def weights(self, step: int, max_steps: float) -> list[float]:
        """Weight of each further token at an optimizer step; they add up to `weight` at the start."""
        total = sum(DECAY**i for i in range(self.tokens))
        return [
            self.weight * DECAY**i / total * _multiplier(self.schedule, i, self.tokens, step / max(1, max_steps))
            for i in range(self.tokens)
        ]

    def forward(self, step: Step) -> Tensor:
        weights = self.weights(step.step, step.max_steps)
        loss = torch.zeros((), device=step.hidden.device)
        if not any(weights):
            return loss
        targets = list(future_targets(step, self.tokens))
        terms = self._sequential if self.kind == "sequential" else self._by_position
        for i, (term, weight) in enumerate(zip(terms(step, targets, weights), weights, strict=False)):
            if weight:
                loss = loss + term
                step.metrics[f"mtp/loss_{i + 2}"] = term.detach() / weight  # of token t + 2, t + 3, ...
        return loss

    def _by_position(self, step: Step, targets: list[Tensor], weights: list[float]) -> Iterator[Tensor]:
        """One weighted loss after the other, each on its own draw of positions."""
        hidden = step.hidden.flatten(0, 1)  # (N, d)
        positions = step.targets.numel() if step.kept is None else step.kept.numel()
        count = max(1, round(self.fraction * positions * ranks.world()))
        for i, target in enumerate(targets):
            if not weights[i]:
                yield hidden.new_zeros(())
                continue
            target = target.flatten()
            index = draw_positions(ranks.gather(target != IGNORED), count, generator(self.seed, step.micro_step, i))
            index = ranks.own(index, len(target))
            rows = hidden.index_select(0, index)[None]  # (1, count, d); over several ranks this one's part
            if self.kind == "parallel":
                rows = self.heads[i](rows)
            yield self._cross_entropy(step, rows, target[index][None], weights[i])

    def _sequential(self, step: Step, targets: list[Tensor], weights: list[float]) -> Iterator[Tensor]:
        """One weighted loss after the other, all on one draw of whole sequences."""
        batch, length = step.tokens.shape
        # valid targets of each sequence, over several ranks of all: (B, k)
        valid = ranks.gather(torch.stack([(target != IGNORED).sum(-1) for target in targets], dim=1))
        candidates = valid.any(1)
        count = max(1, round(self.fraction * batch * ranks.world()))
        index = draw_positions(candidates, count, generator(self.seed, step.micro_step))
        # a sequence stands for this many; the mean of the full loss has the valid targets of all in its denominator
        scale = candidates.sum() / candidates.sum().clamp(1, count)
        shares = valid[index].sum(0) / valid.sum(0).clamp_min(1)  # (k,)
        index = ranks.own(index, batch)
        idle = not len(index)
        if idle:  # every rank has a gradient for every parameter, and be it zero
            index = index.new_zeros(1)
        hidden, embedded = step.hidden[index], step.embedded[index]
        square = square_of(step.lane)
        square = None if square is None else square[index]
        cos, sin = step.gpt.cos[:length], step.gpt.sin[:length]
        kept = None if step.kept is None else KeptRows(step.kept[index])
        for i, target in enumerate(targets[: last_nonzero(weights) + 1]):
            # the last positions read tokens from the sequence's beginning; their targets are ignored
            next_embedded = embedded.roll(-(i + 1), dims=1)
            next_square = None if square is None else square.roll(-(i + 1), dims=1)
            hidden = self.heads[i](hidden, next_embedded, cos, sin, kept=kept, square=next_square)
            if weights[i]:
                drawn = torch.full_like(target[index], IGNORED) if idle else target[index]
                yield self._cross_entropy(step, hidden, drawn, weights[i] * shares[i] * scale)
            else:
                yield hidden.new_zeros(())

    def _cross_entropy(self, step: Step, hidden: Tensor, targets: Tensor, coefficient: Tensor | float) -> Tensor:
        weight, head = step.gpt.head_weight(), step.head_gradient
        options = {"softcap": self.softcap, "head": head, "coefficient": coefficient, "share": ranks.share}
        return linear_cross_entropy(hidden, weight, targets, **options).loss

    def extra_repr(self) -> str:
        return f"{self.kind}, tokens={self.tokens}, weight={self.weight}, {self.schedule}, fraction={self.fraction}"


def future_targets(step: Step, count: int) -> Iterator[Tensor]:
    """The targets (B, T) of token t + 2, t + 3, ... at token t; -100 where there is none in t's own document.

    Documents begin with the separator. Where the next-token objective has kept a part of the tokens, only these have
    targets.
    """
    length = step.tokens.shape[1]
    open_ = torch.ones_like(step.tokens, dtype=torch.bool)  # no document has begun after t
    if step.kept is not None:
        open_ = torch.zeros_like(open_).scatter_(1, step.kept, True)
    for shift in range(1, count + 1):
        target = torch.full_like(step.targets, IGNORED)
        target[:, : length - shift] = step.targets[:, shift:]
        if step.eot_id is not None:
            between = torch.zeros_like(open_)
            between[:, : length - shift] = step.tokens[:, shift:] == step.eot_id
            open_ = open_ & ~between
            target = target.masked_fill(target == step.eot_id, IGNORED)
        yield target.masked_fill(~open_, IGNORED)


def last_nonzero(weights: list[float]) -> int:
    """Index of the last weight that is not zero."""
    return max(i for i, weight in enumerate(weights) if weight)


def _multiplier(schedule: str, index: int, tokens: int, progress: float) -> float:
    if schedule == "deepseek":
        return 1.0 if progress < 2 / 3 else 1 / 3
    if schedule == "reverse":
        # of k tokens the farthest fades in the first of k + 1 equal parts of the run, the nearest in the last but one
        faded = progress * (tokens + 1) - (tokens - 1 - index)
        return min(1.0, max(0.0, 1.0 - faded))
    return 1.0


def _problems(config: GPTConfig, kind, tokens, weight, schedule, token_fraction) -> Iterator[str]:
    if kind not in KINDS:
        yield f"mtp.kind={kind!r} is unknown; choose one of {', '.join(KINDS)}."
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens < config.seq_len:
        yield f"mtp.tokens={tokens!r} must be a whole number from 1 to {config.seq_len - 1}."
    if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        yield f"mtp.weight={weight!r} must be a number of at least 0 (0 is off)."
    if schedule is not None and schedule not in SCHEDULES:
        yield f"mtp.schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)} (or null)."
    if token_fraction is not None and not (isinstance(token_fraction, (int, float)) and 0 < token_fraction <= 1):
        yield f"mtp.token_fraction={token_fraction!r} must lie in (0, 1], or be null."
