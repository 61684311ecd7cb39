"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) on torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nanochat.optim.options import betas, positive
from nanochat.optim.rule import Group, Rule, State, in_float32, zeros_like


def adamw_state(parameter: Tensor) -> State:
    """32-bit moments of a parameter, whatever its own dtype."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": zeros_like(parameter), "exp_avg_sq": zeros_like(parameter)}


def adamw_step(group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
    """One fused step; parameters of lower precision are updated through a float32 copy."""
    if not parameters:
        return
    beta1, beta2 = group["betas"]
    with ExitStack() as copies:
        adamw(
            [copies.enter_context(in_float32(p)) for p in parameters],
            [g.float() for g in gradients],
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


class AdamW(Rule):
    """AdamW with decoupled weight decay: p <- p (1 - lr wd) - lr m / (sqrt(v) + eps), moments bias-corrected."""

    name = "adamw"

    class Options:
        """Decay rates of the moments, and what keeps the division finite."""

        betas: tuple[float, float] = betas(0.9, 0.95)
        eps: float = positive(1e-8)

    def splits(self, group: Group, shapes: Sequence[torch.Size]) -> bool:
        return True

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        return adamw_state(parameter)

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        adamw_step(group, parameters, gradients, states)
