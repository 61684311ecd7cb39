"""Random choices of an objective: pure functions of the run's seed and the position in the data."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose state depends on the key alone (a seed, a micro-batch, a name)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_positions(valid: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Distinct random indices of the true entries, every subset of them as likely as any other.

    Args:
        valid: (N,) bool, on any device.
        count: indices to return, at most N. When fewer entries are valid, all of them come, and then invalid ones, so
            that the shape never depends on the data.

    Returns:
        (count,) int64, sorted.
    """
    keys = torch.randperm(valid.numel(), generator=source)
    keys = keys.to(valid.device, non_blocking=True)  # a copy that blocks waits for all that is queued
    return torch.where(valid, keys, keys - valid.numel()).topk(count).indices.sort().values
