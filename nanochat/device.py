"""Where to compute and how precisely: the one place that decides what `auto` is."""

from __future__ import annotations

import torch


def find_device(name: str = "auto") -> torch.device:
    """The device that a name stands for.

    name: `auto` takes cuda, mps or cpu, the first that this machine has; Lightning's `gpu` leaves out the cpu where it
    can; anything else is torch's own name. Raises `RuntimeError` for a name that torch does not know.
    """
    if name in ("auto", "gpu"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in `32-true` or `bf16-mixed`, as the Trainer would make it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "32-true")


def default_precision(device: torch.device) -> str:
    """Lightning's name of the precision in which a run computes there, unless it says otherwise."""
    return "bf16-mixed" if device.type == "cuda" else "32-true"
