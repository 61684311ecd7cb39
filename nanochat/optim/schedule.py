"""Rates as functions of (step, max_steps) alone, so that a resumed run needs no scheduler state.

A run that ends with its time does not know its number of steps. Its `max_steps` is then `step / progress`, a float that
changes from step to step, where progress is the share of the time that has passed: what is a function of
step / max_steps becomes one of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from nanochat.errors import UserError

HORIZONS = ("steps", "time")
"""what a run, and its schedule, may end with"""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up times a shape: `schedule(step, max_steps)` is the factor on every rate at a step counted from 0.

    Args:
        warmup_steps: steps of warm-up; never more than a tenth of the run, so that a short run learns too.
        horizon: `steps`, or `time` where the run ends with its time.

    Raises `UserError` for values out of range.
    """

    warmup_steps: int = 0
    horizon: str = field(default="steps", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps={self.warmup_steps!r} must be a whole number of at least 0.")
        if self.horizon not in HORIZONS:
            raise UserError(f"schedule.horizon={self.horizon!r} must be steps or time.")
        floor, fraction = getattr(self, "floor", 0.0), getattr(self, "decay_fraction", 1.0)
        if not 0.0 <= floor <= 1.0:
            raise UserError(f"schedule.floor={floor!r} must lie between 0 and 1 (a fraction of the highest rate).")
        if not 0.0 <= fraction <= 1.0:
            raise UserError(f"schedule.decay_fraction={fraction!r} must lie between 0 and 1.")

    def warmup(self, max_steps: float) -> int:
        """Steps of warm-up in a run of `max_steps`."""
        return int(min(self.warmup_steps, max_steps / 10))

    def shape(self, step: int, max_steps: float) -> float:
        """The factor without the warm-up."""
        return 1.0

    def rising(self, step: int, max_steps: float) -> float:
        """The factor of the warm-up."""
        if self.horizon == "steps":
            warmup = self.warmup(max_steps)
            return (step + 1) / warmup if step < warmup else 1.0
        if step >= self.warmup_steps:
            return 1.0
        # by steps, and by time where those would take longer than a tenth of it: squared, since the first step is slow
        # (compilation) and says little of the pace
        return min(1.0, max((step + 1) / self.warmup_steps, (10.0 * step / max_steps) ** 2))

    def __call__(self, step: int, max_steps: float) -> float:
        return self.rising(step, max_steps) * self.shape(step, max_steps)


@dataclass(frozen=True)
class Constant(Schedule):
    """Flat after the warm-up."""


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: flat, then linear to `floor` over the last `decay_fraction` of the run."""

    decay_fraction: float = 0.4
    floor: float = 0.05

    def shape(self, step: int, max_steps: float) -> float:
        decay = self.decay_fraction * max_steps
        left = max_steps - step
        return 1.0 if left >= decay else self.floor + (1.0 - self.floor) * max(0.0, left / decay)


@dataclass(frozen=True)
class Linear(Schedule):
    """Linear from the end of the warm-up to `floor`."""

    floor: float = 0.0

    def shape(self, step: int, max_steps: float) -> float:
        return self.floor + (1.0 - self.floor) * (1.0 - self._progress(step, max_steps))

    def _progress(self, step: int, max_steps: float) -> float:
        warmup = self.warmup(max_steps)
        return min(1.0, max(0.0, (step - warmup) / max(1, max_steps - warmup)))


@dataclass(frozen=True)
class Cosine(Linear):
    """Half a cosine from the end of the warm-up to `floor`."""

    floor: float = 0.1

    def shape(self, step: int, max_steps: float) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * self._progress(step, max_steps)))


def _linear_to_zero(step: int, max_steps: float) -> float:
    return max(0.0, 1.0 - step / max_steps)


def _first_half(step: int, max_steps: float) -> float:
    return 1.0 if 2 * step < max_steps else 0.0


WEIGHT_DECAY_SCHEDULES: dict[str, Callable[[int, float], float]] = {
    "constant": lambda step, max_steps: 1.0,
    "linear": _linear_to_zero,
    "first_half": _first_half,
}
"""Factors on the weight decay; ternary training prefers none in its second half (BitNet b1.58's recipe)."""
