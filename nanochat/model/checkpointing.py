"""Activation checkpointing (arXiv:1604.06174): activations are dropped after the forward pass and computed again.

What is computed again is the same to the last bit, so losses and gradients do not depend on it. A recomputed block
keeps nothing but the residual stream that it reads; its backward pass costs one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MODES = ("none", "feedforward", "every_other", "block")
"""what is recomputed: nothing, the feed-forward sub-layers, every second block, all blocks"""


class Checkpointed(nn.Module):
    """A module parts of which may be recomputed; `recompute` says which."""

    recompute = "none"
    """none, feedforward or block"""


def recomputed(on: bool, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`; if `on`, and there will be a backward pass, it is computed again there.

    The function must not draw random numbers.
    """
    if not on or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def set_checkpointing(module: nn.Module, mode: str) -> None:
    """Choose what the blocks below a module recompute: one of `MODES`."""
    blocks = [child for child in module.modules() if isinstance(child, Checkpointed)]
    for index, block in enumerate(blocks):
        block.recompute = mode if mode != "every_other" else ("block" if index % 2 else "none")
