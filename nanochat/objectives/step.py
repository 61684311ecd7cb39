"""What the objectives of one micro-batch share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nanochat.model import GPT
from nanochat.model.value_embeddings import Lane
from nanochat.objectives.linear_cross_entropy import HeadGradient


@dataclass
class Step:
    """One micro-batch on its way through the objectives; the next-token objective comes first and fills it in."""

    gpt: GPT
    tokens: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64; -100 is ignored"""
    hidden: Tensor
    """(B, T, d), after the final norm"""
    embedded: Tensor
    """(B, T, d), the token embeddings, shared with MTP"""
    lane: Lane | None = None
    """the tokens' value embeddings, if the model has any"""
    step: int = 0
    """optimizer steps done before this micro-batch"""
    max_steps: float = 1
    micro_step: int = 0
    """micro-batches consumed before this one: with the seed, the whole randomness of an objective"""
    eot_id: int | None = None
    """the token that starts each document; None when the data has no documents"""
    per_token_loss: Tensor | None = None
    """(B, T) next-token cross entropy in nats, detached; 0 where ignored"""
    kept: Tensor | None = None
    """(B, K) sorted positions that a selector kept; None = all"""
    head_gradient: HeadGradient = field(default_factory=HeadGradient)
    """what all terms add their gradient of the output matrix to"""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """scalars to log under their full names, detached"""

    @classmethod
    def of(cls, gpt: GPT, tokens: Tensor, targets: Tensor, **fields: Any) -> Step:
        """The tokens' way through the network, up to the objectives."""
        embedded, lane = gpt.embed(tokens), gpt.lane(tokens)
        return cls(gpt, tokens, targets, gpt.trunk(embedded, lane), embedded, lane, **fields)


class Objective(nn.Module):
    """A term of the loss: `objective(step) -> scalar`. It may own parameters.

    The LightningModule builds each objective as `_target_(**options, config=GPTConfig, seed=int)`.
    """

    def forward(self, step: Step) -> Tensor:
        raise NotImplementedError

    def blocks(self) -> Iterable[nn.Module]:
        """Large modules that are used by being called alone: of a sharded network the weights of each are gathered for
        its own calls, those of the rest for the whole of a micro-batch."""
        return ()
