"""How many drafts of multi-token prediction the model itself would accept."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from nanochat.errors import UserError
from nanochat.model import GPT
from nanochat.model.value_embeddings import square_of
from nanochat.objectives import IGNORED, Step
from nanochat.objectives.mtp import MultiTokenPrediction, future_targets

CHUNK = 256
"""rows whose logits exist at a time"""


class DraftAcceptance(Callback):
    """Logs `val/mtp_acceptance_2` and on at each validation: the share of positions t at which the heads' likeliest
    token t + 2 (and t + 3, ...) is the trunk's own, as are all drafts before it.

    That is greedy speculative decoding along the validation text: of `mtp.kind=sequential` and `parallel`; the other
    kind has no heads. Drafts across the beginning of a document do not count.

    Args:
        sequences: of the first batch of validation that are looked at.
    """

    def __init__(self, sequences: int = 4) -> None:
        if sequences < 1:
            raise UserError(f"callbacks.draft_acceptance.sequences={sequences} must be at least 1.")
        self.sequences = sequences
        self._batch: tuple[Tensor, Tensor] | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._batch = batch["tokens"][: self.sequences], batch["targets"][: self.sequences]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batch, self._batch = self._batch, None
        objectives = pl_module.objectives.values()  # type: ignore[union-attr, operator]
        mtp = next((o for o in objectives if isinstance(o, MultiTokenPrediction)), None)
        if batch is None or mtp is None or not mtp.heads or not mtp.weight:
            return
        eot = trainer.datamodule.eot_id  # type: ignore[attr-defined]
        for i, share in enumerate(acceptance(pl_module.gpt, mtp, *batch, eot).tolist()):  # type: ignore[arg-type]
            pl_module.log(f"val/mtp_acceptance_{i + 2}", share, logger=False)


@torch.no_grad()
def acceptance(gpt: GPT, mtp: MultiTokenPrediction, tokens: Tensor, targets: Tensor, eot_id: int | None) -> Tensor:
    """(k,): for each further token the share of positions at which its draft and those before it are accepted.

    tokens, targets: (B, T). A draft is accepted when it is the token that the trunk, given the text up to there, finds
    likeliest.
    """
    step = Step.of(gpt, tokens, targets, eot_id=eot_id)
    own = _likeliest(gpt, step.hidden)  # (B, T): at t of token t + 1
    hidden, length = step.hidden, tokens.shape[1]
    square = square_of(step.lane)
    accepted = torch.ones_like(own, dtype=torch.bool)
    shares = []
    for i, target in enumerate(future_targets(step, mtp.tokens)):
        if mtp.kind == "sequential":
            beside = None if square is None else square.roll(-(i + 1), dims=1)
            following = step.embedded.roll(-(i + 1), dims=1)
            drafted = hidden = mtp.heads[i](hidden, following, gpt.cos[:length], gpt.sin[:length], square=beside)
        else:
            drafted = mtp.heads[i](step.hidden)
        # what lies beyond the end has come round from the beginning, and has no target
        accepted &= _likeliest(gpt, drafted) == own.roll(-(i + 1), dims=1)
        valid = target != IGNORED
        shares.append((accepted & valid).sum() / valid.sum().clamp_min(1))
    return torch.stack(shares)


def _likeliest(gpt: GPT, hidden: Tensor) -> Tensor:
    """(B, T, d) -> (B, T) tokens."""
    rows = hidden.flatten(0, 1).split(CHUNK)
    return torch.cat([gpt.logits(chunk).argmax(-1) for chunk in rows]).view(hidden.shape[:2])
