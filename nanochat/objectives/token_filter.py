"""The tokens of a sequence that a filter keeps (Collider, arXiv:2502.00340): a fixed number, by the highest score."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_count(length: int, sparsity: float) -> int:
    """How many of a sequence's tokens are kept; at least one."""
    return max(1, round((1.0 - sparsity) * length))


class TopTokens:
    """Selector: the `count` tokens of each sequence with the highest score, never an ignored target before a valid one.

    Args:
        count: tokens to keep in each sequence.
        baseline: (B, T), taken off the losses (excess loss: the losses of a reference model).
        scores: (B, T), in place of the losses.

    The loss calls it once for every chunk of whole sequences, in their order.
    """

    def __init__(self, count: int, baseline: Tensor | None = None, scores: Tensor | None = None) -> None:
        self.count, self.baseline, self.scores = count, baseline, scores
        self._seen = 0

    def __call__(self, losses: Tensor) -> Tensor:
        """losses: (B', T), -inf where ignored; returns (B', count) sorted positions."""
        rows = slice(self._seen, self._seen + losses.shape[0])
        self._seen = rows.stop
        scores = losses
        if self.scores is not None:
            scores = self.scores[rows].masked_fill(losses == -torch.inf, -torch.inf)
        elif self.baseline is not None:
            scores = losses - self.baseline[rows]
        return scores.topk(self.count, dim=1).indices.sort(dim=1).values
