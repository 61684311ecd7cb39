"""What autocast does to a function that brings a backward of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor, device: torch.device | None = None) -> torch.dtype:
    """The dtype of a matrix product that reads x: autocast's where it is on, else x's own.

    device: of the product, where x does not say.
    """
    kind = (device or x.device).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight for a product of some dtype, where it is kept in a narrower one; else as it is."""
    return weight.to(dtype) if weight.dtype.itemsize < dtype.itemsize else weight
