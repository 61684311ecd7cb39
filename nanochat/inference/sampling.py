"""From logits to a token: penalties and biases, temperature, top-k, top-p (nucleus, arXiv:1904.09751), min-p
(arXiv:2407.01082).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.errors import UserError

DIVERGED = "the model's logits are not finite: this checkpoint is of a run that diverged."
FIRST_LOOK = 512
"""tokens that are sorted to find those of top-p, before all of them are"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises `UserError` for values that mean nothing."""

    temperature: float = 0.8
    """logits are divided by it; 0 takes the most likely token"""
    top_k: int = 0
    """keep the k most likely tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the fewest tokens whose probabilities reach top_p; 1 keeps all"""
    min_p: float = 0.0
    """keep the tokens that are at least min_p times as likely as the most likely one; 0 keeps all"""
    repetition_penalty: float = 1.0
    """logits of tokens in the prompt or the answer are divided by it, negative ones multiplied (arXiv:1909.05858)"""
    presence_penalty: float = 0.0
    """taken off the logit of a token that the answer has already"""
    frequency_penalty: float = 0.0
    """taken off the logit for each time that the answer has the token"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, value) pairs: added to the logits"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature} must be a number of at least 0.")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must be at least 1, or 0 for no limit.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p {self.min_p} must be from 0 to 1.")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"--repetition-penalty {self.repetition_penalty} must be a number above 0.")
        for name, value in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not math.isfinite(value):
                raise UserError(f"--{name}-penalty {value} must be a number.")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by what was written, or by a bias."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias)

    @property
    def shape(self) -> tuple[float, int, float, float]:
        """What `probabilities` reads: rows that share it can be drawn together."""
        return self.temperature, self.top_k, self.top_p, self.min_p


def adjust(logits: Tensor, sampling: Sampling, context: Sequence[int], counts: Mapping[int, int]) -> Tensor:
    """Logits (V,) after penalties and biases.

    context: different tokens of prompt and answer; counts: how often the answer has each of its tokens.
    """
    logits = logits.clone()
    size = logits.shape[-1]
    if sampling.repetition_penalty != 1.0 and context:
        seen = torch.tensor([token for token in context if token < size], device=logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and counts:
        tokens = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, value in sampling.logit_bias:
        if token < size:
            logits[token] += value
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from: temperature, then top-k, top-p and min-p.

    logits: (..., V); returns (..., V) float64 that sums to 1 (one-hot at temperature 0). Of equal logits at
    the edge of top-k or top-p some are kept, so that exactly k stay.
    """
    logits = logits.double()
    best = logits.argmax(dim=-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    # the largest logit is taken off first, so that a tiny temperature overflows nothing
    scaled = (logits - logits.gather(-1, best)) / sampling.temperature
    size = logits.shape[-1]
    top_k = min(sampling.top_k or size, size)
    if top_k == size and sampling.top_p == 1:
        return _at_least(scaled.softmax(-1), sampling.min_p)
    if top_k == size:
        kept, order = _nucleus(scaled.softmax(-1), sampling.top_p)
    else:
        kept, order = scaled.topk(top_k, dim=-1)
        kept = kept.softmax(-1)
        if sampling.top_p < 1:
            kept = _cut(kept, sampling.top_p)
    return torch.zeros_like(scaled).scatter_(-1, order, _at_least(kept, sampling.min_p))


def _cut(ranked: Tensor, top_p: float) -> Tensor:
    """Ranked probabilities without those ranked behind the first ones that reach top_p."""
    before = ranked.cumsum(-1) - ranked  # probability of all tokens ranked above this one
    ranked = ranked.masked_fill(before >= top_p, 0.0)
    return ranked / ranked.sum(-1, keepdim=True)


def _nucleus(distribution: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The probabilities of top-p, ranked, and their tokens; a few tokens are looked at first, sorting all is slow."""
    size = distribution.shape[-1]
    few, order = distribution.topk(min(FIRST_LOOK, size), dim=-1)
    if few.shape[-1] < size and bool((few.sum(-1) - few[..., -1] < top_p).any()):
        few, order = distribution.topk(size, dim=-1)
    return _cut(few, top_p), order


def _at_least(distribution: Tensor, min_p: float) -> Tensor:
    if min_p == 0:
        return distribution
    edge = min_p * distribution.amax(-1, keepdim=True)
    kept = distribution.masked_fill(distribution < edge, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def draw_tokens(distribution: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row, by inverting the cumulative distribution at a uniform number of the row's
    generator.

    distribution: (B, V); generators: B, on the CPU; returns (B,) int64. A row's result depends on its own
    generator alone, so that a batch draws what its rows would draw one by one.

    Raises `UserError` when a row is not finite (a model that diverged).
    """
    cumulative = distribution.cumsum(-1)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise UserError(DIVERGED)
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # (B, 1)
    index = torch.searchsorted(cumulative, uniform.to(total.device) * total, right=True)  # (B, 1)
    # rounding can push the number onto the total itself; the most likely token stands in
    index = torch.where(index < distribution.shape[-1], index, distribution.argmax(-1, keepdim=True))
    return index[:, 0]


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """logits (B, V) -> tokens (B,)."""
    return draw_tokens(probabilities(logits, sampling), generators)
