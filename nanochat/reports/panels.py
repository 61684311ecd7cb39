"""What a dashboard shows: the panels as data, for W&B's workspace and report and for the local page alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One chart.

    Args:
        title: above it.
        unit: of its values.
        keys: names of metrics, as in metrics.csv and in W&B.
        against: `tokens` or `time`.
        numbered: whether the keys are the beginnings of names that go on with `_0`, `_1`, ..., one for each layer or
            token.
    """

    title: str
    unit: str
    keys: tuple[str, ...]
    against: str = "tokens"
    numbered: bool = False

    def pattern(self) -> str:
        """A regular expression that the names of its metrics match, and no others."""
        names = "|".join(map(re.escape, self.keys))
        return f"^({names}){'_[0-9]+' if self.numbered else ''}$"

    def found(self, names: Iterable[str]) -> list[str]:
        """Those of some names that belong to it, layers in their order."""
        mine = [name for name in dict.fromkeys(names) if re.match(self.pattern(), name)]
        return sorted(
            mine, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
        )


@dataclass(frozen=True)
class Block:
    """Panels under a heading; needs: what a run must have for them, for a reader."""

    heading: str
    panels: tuple[Panel, ...]
    needs: str = ""


SUMMARY = ("best/val/bpb", "val/bpb", "val/loss", "train/tokens_per_second", "optim/bytes", "parameters", "tokens")
"""figures of a run's summary, a bar for each run"""
SAMPLES = "samples"
"""the table of texts: step, prompt, text"""
BLOCKS: Sequence[Block] = (
    Block(
        "Result",
        (
            Panel("Bits per byte of validation text", "bits per byte", ("val/bpb",)),
            Panel("Bits per byte against time", "bits per byte", ("val/bpb",), against="time"),
            Panel("Validation loss", "nats per token", ("val/loss",)),
        ),
    ),
    Block(
        "Training",
        (
            Panel("Training loss", "nats per token", ("train/loss",)),
            Panel("Gradient norm", "L2 norm before clipping", ("train/grad_norm",)),
            Panel("Learning rate", "optim.lr by its schedule", ("train/lr",)),
            Panel("Skipped steps", "steps", ("skipped_steps",)),
        ),
    ),
    Block(
        "Speed and memory",
        (
            Panel("Speed", "tokens/s", ("train/tokens_per_second",)),
            Panel("Waiting for data", "share of the time", ("train/data_wait",)),
            Panel("Optimizer state", "bytes", ("optim/bytes",)),
        ),
    ),
    Block(
        "GPU",
        (
            Panel("Use of the GPU", "MFU", ("train/mfu",)),
            Panel("Peak memory", "bytes", ("memory/peak_bytes",)),
        ),
        "a GPU",
    ),
    Block(
        "Ternary weights",
        (
            Panel("Zeros", "share of the weights", ("ternary/zeros",)),
            Panel("Flips", "share of the weights a step", ("ternary/flips",)),
            Panel("Scale", "mean", ("ternary/scale",)),
            Panel("Zeros by layer", "share of the weights", ("ternary/zeros",), numbered=True),
            Panel("Flips by layer", "share of the weights a step", ("ternary/flips",), numbered=True),
            Panel("Scale by layer", "mean", ("ternary/scale",), numbered=True),
        ),
        "ternary weights, and callbacks.ternary_health",
    ),
    Block(
        "Multi-token prediction",
        (
            Panel("Accepted drafts", "share of the positions", ("val/mtp_acceptance",), numbered=True),
            Panel("Losses of the heads", "nats per token", ("mtp/loss",), numbered=True),
        ),
        "+mtp=on",
    ),
    Block(
        "Token filter",
        (
            Panel("Kept tokens", "share of the targets", ("collider/kept_fraction",)),
            Panel("Losses on both sides", "nats per token", ("collider/kept_loss", "collider/dropped_loss")),
        ),
        "+collider=on",
    ),
)
