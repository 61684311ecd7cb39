"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) on torch's fused kernel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nanochat.optim.rule import Group, Rule, State


def adamw_state(parameter: Tensor) -> State:
    """32-bit moments of a parameter, whatever its own dtype."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format),
    }


def adamw_step(group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
    """One fused step; parameters of lower precision are moved through a float32 copy."""
    if not parameters:
        return
    beta1, beta2 = group["betas"]
    wide = [p if p.dtype == torch.float32 else p.float() for p in parameters]
    adamw(
        wide,
        [g if g.dtype == torch.float32 else g.float() for g in gradients],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for parameter, moved in zip(parameters, wide, strict=True):
        if moved is not parameter:
            parameter.copy_(moved)


class AdamW(Rule):
    """AdamW with decoupled weight decay: p <- p (1 - lr wd) - lr m / (sqrt(v) + eps), moments bias-corrected."""

    name = "adamw"
    options: ClassVar = {"betas": (0.9, 0.95), "eps": 1e-8}

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        return adamw_state(parameter)

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        adamw_step(group, parameters, gradients, states)
