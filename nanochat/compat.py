"""Private functions of other packages that nanochat uses, each with the reason; tests/test_compat.py watches them."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 @ b (K, N) int8 -> (M, N) int32, exact. torch has no public product of int8 matrices."""
    return torch._int_mm(a, b)  # type: ignore[attr-defined]
