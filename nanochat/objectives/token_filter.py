"""The tokens of a sequence that a filter keeps (Collider, arXiv:2502.00340): a fixed number, by score or by chance."""

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


UNIFORM = 0.05
"""share of a token's chance of being kept that does not depend on its gradient, which bounds the weights"""


class GradientSample:
    """Selector: `count` tokens of each sequence by chance, those with a large gradient more likely, and row weights.

    With the weights the gradient at the head and at the final hidden states stays unbiased: a token of probability p
    weighs 1 / p (Horvitz and Thompson). p follows the norm of softmax minus one-hot, the token's part of the head's
    gradient (after Katharopoulos and Fleuret, arXiv:1803.00942). One uniform number a sequence places an even comb over
    the tokens' probabilities, laid end to end with equal targets side by side: of the tokens with one target the comb
    takes nearly the expected share, so that their row of the head's gradient varies least.

    Args:
        count: tokens to keep in each sequence.
        targets: (B, T).
        starts: (B,) uniform numbers from [0, 1).

    The loss calls it once for every chunk of whole sequences, in their order.
    """

    by_gradient = True
    """the scores are norms of gradients"""

    def __init__(self, count: int, targets: Tensor, starts: Tensor) -> None:
        self.count, self.targets, self.starts = count, targets, starts
        self._seen = 0

    def __call__(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """norms: (B', T), -inf where ignored; returns sorted positions and their weights, (B', count) each.

        Where fewer tokens are valid, all of them are kept with weight 1, and ignored ones with weight 0.
        """
        rows = slice(self._seen, self._seen + norms.shape[0])
        self._seen = rows.stop
        exact = torch.float32 if norms.device.type == "mps" else torch.float64
        p = probabilities(norms.to(exact), self.count)  # (B', T)
        order = self.targets[rows].argsort(dim=1, stable=True)
        ends = p.gather(1, order).cumsum(1)
        teeth = (ends - self.starts[rows, None].to(ends)).floor()  # of the comb, up to and with a token
        before = torch.cat((torch.full_like(teeth[:, :1], -1.0), teeth[:, :-1]), dim=1)
        hit = torch.zeros_like(p).scatter_(1, order, (teeth > before).to(exact))
        # exactly `count`, where rounding has put a tooth too many, or two on one token: the likeliest first
        positions = (2.0 * hit + p).topk(self.count, dim=1).indices.sort(dim=1).values
        chance = p.gather(1, positions)
        return positions, torch.where(chance == 0, 0.0, 1.0 / chance)


def probabilities(norms: Tensor, count: int) -> Tensor:
    """(B, T): of being kept, at most 1, `count` in all where so many are valid; 0 for ignored tokens (-inf)."""
    valid = ~norms.isneginf()
    number = valid.sum(1, keepdim=True)
    norms = norms.masked_fill(~valid, 0.0)
    mean = norms.sum(1, keepdim=True) / number.clamp_min(1)
    chance = (UNIFORM + (1.0 - UNIFORM) * norms / mean.clamp_min(torch.finfo(norms.dtype).tiny)) * valid
    # the m likeliest are certain; the others share what is left of the count, in proportion
    high = chance.sort(dim=1, descending=True).values
    rest = high.flip(1).cumsum(1).flip(1).clamp_min(torch.finfo(norms.dtype).tiny)
    certain = torch.arange(high.shape[1], device=high.device)
    factor = (number.clamp_max(count) - certain) / rest
    fits = (factor * high <= 1.0 + 1e-12) | (certain >= number.clamp_max(count) - 1)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    return (factor.gather(1, first) * chance).clamp_max(1.0)
