"""Which steps stand out: a window of recent losses and gradient norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError


class SpikeWindow:
    """Tells a spike from the noise, as OLMo-core's skip-step optimizers do: a value that lies more than `sigma`
    standard deviations above the mean of the `window` values before it.

    Args:
        sigma: standard deviations.
        window: finite steps that are remembered, at least 4. Spikes are among them, so that a loss which has risen for
            good is accepted after a while. Nothing is a spike before half of them are there.

    All is computed on the device of what comes in, in float32; nothing waits for the host.

    Raises:
        UserError: values out of range.
    """

    def __init__(self, sigma: float = 6.0, window: int = 128) -> None:
        if not sigma > 0 or window < 4:
            raise UserError(
                f"callbacks.guard.spike_sigma={sigma} must be above 0 (null: no spikes are looked for), and "
                f"callbacks.guard.spike_window={window} at least 4."
            )
        self.sigma, self.window = float(sigma), window
        self._values: Tensor | None = None  # (2, window): losses and norms, the oldest of which are overwritten
        self._count = 0

    def is_spike(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether either stands out, a 0-d bool; False where one is not finite."""
        new = _pair(loss, norm)  # (2,)
        if self._values is None or self._count < self.window // 2:
            return torch.zeros((), dtype=torch.bool, device=new.device)
        known = self._values[:, : min(self._count, self.window)]  # (2, n)
        deviation, mean = torch.std_mean(known, dim=1)  # of a sample: n - 1
        return (new - mean > self.sigma * deviation).any() & torch.isfinite(new).all()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Remember a step; both must be finite."""
        new = _pair(loss, norm)
        if self._values is None:
            self._values = torch.zeros(2, self.window, device=new.device)
        self._values = self._values.to(new.device)
        self._values[:, self._count % self.window] = new
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """A copy, on the CPU."""
        values = None if self._values is None else self._values.cpu().clone()
        return {"values": values, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; one of another length is left out, and the window fills anew."""
        values = state["values"]
        if values is not None and values.shape[1] == self.window:
            self._values, self._count = values.clone(), int(state["count"])


def _pair(loss: Tensor, norm: Tensor) -> Tensor:
    return torch.stack([loss.detach().float(), norm.detach().float().to(loss.device)])
