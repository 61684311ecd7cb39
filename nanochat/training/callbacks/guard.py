"""Steps whose gradient is not finite, or that stand out, are dropped; a row of the first ends the attempt."""

from __future__ import annotations

import logging
import math
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from nanochat.errors import UserError
from nanochat.training.callbacks.spikes import SpikeWindow

log = logging.getLogger(__name__)

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
        spike_sigma: drop a step, too, whose loss or gradient norm lies so many standard deviations above the recent
            ones, see `SpikeWindow`; None: only what is not finite. Spikes do not count for `patience`.
        spike_window: recent steps for it.

    Both decisions take the one host sync of a step, which brings its metrics to the host, too. `spikes`, how many there
    were, is in the metrics where they are looked for; they are part of `skipped_steps`.

    Raises:
        NonFiniteError: `patience` steps in a row were dropped.
    """

    def __init__(
        self, patience: int = 10, max_rollbacks: int = 3, spike_sigma: float | None = None, spike_window: int = 128
    ) -> None:
        if patience < 1 or max_rollbacks < 0:
            raise UserError(
                f"callbacks.guard.patience={patience} must be at least 1, and "
                f"callbacks.guard.max_rollbacks={max_rollbacks} not negative."
            )
        self.patience, self.max_rollbacks = patience, max_rollbacks
        self.streak = 0
        self.window = None if spike_sigma is None else SpikeWindow(spike_sigma, spike_window)
        self.spikes = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        finite, spike = self._look(trainer, pl_module)
        if finite:
            self.streak = 0
            self.spikes += spike
            optimizer.skip_next = spike  # False saves quantised states a look at the gradients, and a host sync
            return
        optimizer.skip_next = True
        self.streak += 1
        if self.streak >= self.patience:
            raise NonFiniteError(trainer.global_step, self.streak, self.max_rollbacks)

    def _look(self, trainer: Trainer, module: Any) -> tuple[bool, bool]:
        """Whether the step is finite, and whether it stands out."""
        norm: Tensor = module.gradient_norm()
        if self.window is None:
            return math.isfinite(module.numbers["train/grad_norm"]), False
        loss: Tensor = module.step_means()["train/loss"]
        spike, total = module.read_numbers(self.window.is_spike(loss, norm), loss + norm)
        finite = math.isfinite(total)
        if spike:
            log.warning("Step %d stands out and is skipped: loss %.4g, gradient norm %.4g.",
                        trainer.global_step + 1, module.numbers["train/loss"],
                        module.numbers["train/grad_norm"])  # fmt: skip
        if finite:
            self.window.add(loss, norm)
        return finite, bool(spike)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.window is not None:
            pl_module.step_metrics["spikes"] = self.spikes  # type: ignore[index, operator]

    def state_dict(self) -> dict[str, Any]:
        window = {} if self.window is None else {"window": self.window.state_dict(), "spikes": self.spikes}
        return {"streak": self.streak, **window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.streak = int(state_dict["streak"])
        if self.window is not None and "window" in state_dict:
            self.window.load_state_dict(state_dict["window"])
            self.spikes = int(state_dict["spikes"])
