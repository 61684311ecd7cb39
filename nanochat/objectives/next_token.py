"""The next-token objective, and the place where a selector (Collider) enters."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat import ranks
from nanochat.errors import ConfigError
from nanochat.model import GPTConfig
from nanochat.objectives.linear_cross_entropy import IGNORED, Selector, linear_cross_entropy
from nanochat.objectives.step import Objective, Step


class NextToken(Objective):
    """Mean cross entropy of the next token.

    Args:
        label_smoothing: share of the probability spread over the vocabulary, in [0, 1).
        z_loss: factor of logsumexp².
        chunk: tokens whose logits exist at a time; None chooses by device.

    `selector` is set and removed by a callback; it sees the losses of whole sequences and names the tokens to keep,
    on which the blocks' backward will then run, too.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int = 0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing={label_smoothing} must lie in [0, 1).")
        if not z_loss >= 0:
            raise ConfigError(f"loss.z_loss={z_loss} must not be negative.")
        if chunk is not None and chunk < 1:
            raise ConfigError(f"loss.chunk={chunk} must be at least 1 (or null).")
        self.softcap = config.softcap
        self.label_smoothing, self.z_loss, self.chunk = label_smoothing, z_loss, chunk
        self.selector: Selector | None = None

    def forward(self, step: Step) -> Tensor:
        result = linear_cross_entropy(
            step.hidden,
            step.gpt.head_weight(),
            step.targets,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            selector=self.selector,
            chunk=self.chunk,
            head=step.head_gradient,
            share=ranks.share,
        )
        step.per_token_loss, step.kept = result.per_token, result.kept
        # the plain mean over all valid targets, so that runs with and without smoothing or a filter compare
        valid = ranks.share((step.targets != IGNORED).sum())
        step.metrics["train/loss"] = result.per_token.sum() / valid
        if result.kept is not None:
            if step.gpt.kept_rows is not None:
                step.gpt.kept_rows.positions = result.kept
            step.metrics |= kept_metrics(step.targets, result.per_token, result.kept)
        return result.loss


def kept_metrics(targets: Tensor, per_token: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """What a filter did to a micro-batch: the share of valid targets kept, and the mean losses on both sides.

    targets, per_token: (B, T); kept: (B, K) positions.
    """
    valid = targets != IGNORED
    chosen = torch.zeros_like(valid).scatter_(1, kept, True) & valid
    count, total = chosen.sum(), valid.sum()
    kept_loss = (per_token * chosen).sum()
    all_valid, all_kept, all_dropped = ranks.share(torch.stack((total, count, total - count)))
    return {
        "collider/kept_fraction": count / all_valid,
        "collider/kept_loss": kept_loss / all_kept,
        "collider/dropped_loss": (per_token.sum() - kept_loss) / all_dropped,
    }
