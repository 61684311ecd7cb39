"""Steps whose gradient is not finite are dropped; a row of them ends the attempt."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from nanochat.errors import UserError

RATE_FACTOR = 0.5
"""the learning rate's factor at each return to a checkpoint"""


class NonFiniteError(RuntimeError):
    """Too many steps in a row without a finite gradient.

    Args:
        step: optimizer steps done.
        streak: dropped steps in a row.
        max_rollbacks: how often a run may go back.
    """

    def __init__(self, step: int, streak: int, max_rollbacks: int) -> None:
        super().__init__(f"The gradient was not finite in {streak} steps in a row, up to step {step}.")
        self.step, self.streak, self.max_rollbacks = step, streak, max_rollbacks

    def next_rate_scale(self, current: float) -> float:
        """The factor of all learning rates for the next attempt.

        Raises:
            UserError: the run has gone back `max_rollbacks` times already.
        """
        if current <= RATE_FACTOR**self.max_rollbacks:
            raise UserError(
                f"training diverges: the gradient was not finite in {self.streak} steps in a row, up to step "
                f"{self.step}, after {self.max_rollbacks} returns to a checkpoint (learning rates x {current:g}); "
                "lower optim.lr, lengthen schedule.warmup_steps, or set trainer.gradient_clip_val."
            ) from self
        return current * RATE_FACTOR


class NonFiniteGuard(Callback):
    """Drops an optimizer step, with all of its micro-batches, when the global gradient norm is not finite.

    Args:
        patience: dropped steps in a row after which the run goes back to its last checkpoint with half the rates.
        max_rollbacks: how often it does so before it gives up.

    Raises:
        NonFiniteError: `patience` steps in a row were dropped.
    """

    def __init__(self, patience: int = 10, max_rollbacks: int = 3) -> None:
        if patience < 1 or max_rollbacks < 0:
            raise UserError(
                f"callbacks.guard.patience={patience} must be at least 1, and "
                f"callbacks.guard.max_rollbacks={max_rollbacks} not negative."
            )
        self.patience, self.max_rollbacks = patience, max_rollbacks
        self.streak = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if bool(torch.isfinite(pl_module.gradient_norm())):  # type: ignore[operator]
            self.streak = 0
            optimizer.skip_next = False  # saves quantised states a look at the gradients, and a host sync
            return
        optimizer.skip_next = True
        self.streak += 1
        if self.streak >= self.patience:
            raise NonFiniteError(trainer.global_step, self.streak, self.max_rollbacks)

    def state_dict(self) -> dict[str, Any]:
        return {"streak": self.streak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.streak = int(state_dict["streak"])
