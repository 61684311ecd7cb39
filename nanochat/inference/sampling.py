"""From logits to a token: temperature, then top-k, then top-p (nucleus, arXiv:1904.09751)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises `UserError` for values that mean nothing."""

    temperature: float = 0.8
    """logits are divided by it; 0 takes the most likely token"""
    top_k: int = 0
    """keep the k most likely tokens; 0 keeps all"""
    top_p: float = 1.0
    """keep the fewest tokens whose probabilities reach top_p; 1 keeps all"""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"--temperature {self.temperature} must be a number of at least 0.")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must be at least 1, or 0 for no limit.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1.")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from.

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
    if (not sampling.top_k or sampling.top_k >= size) and sampling.top_p == 1:
        return scaled.softmax(-1)
    kept, order = scaled.topk(min(sampling.top_k or size, size), dim=-1)
    kept = kept.softmax(-1)
    if sampling.top_p < 1:
        before = kept.cumsum(-1) - kept  # probability of all tokens ranked above this one
        kept = kept.masked_fill(before >= sampling.top_p, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(scaled).scatter_(-1, order, kept)


def draw(distribution: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row, by inverting the cumulative distribution at a uniform number of the row's
    generator.

    distribution: (B, V); generators: B, on the CPU; returns (B,) int64. A row's result depends on its own
    generator alone, so that a batch draws what its rows would draw one by one.

    Raises `UserError` when a row is not finite (a model that diverged).
    """
    cumulative = distribution.cumsum(-1)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise UserError("the model's logits are not finite: this checkpoint is of a run that diverged.")
    uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])  # (B, 1)
    index = torch.searchsorted(cumulative, uniform.to(total.device) * total, right=True)  # (B, 1)
    # rounding can push the number onto the total itself; the most likely token stands in
    index = torch.where(index < distribution.shape[-1], index, distribution.argmax(-1, keepdim=True))
    return index[:, 0]


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """logits (B, V) -> tokens (B,)."""
    return draw(probabilities(logits, sampling), generators)
