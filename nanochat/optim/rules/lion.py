"""Lion (Chen et al., arXiv:2302.06675): the sign of an interpolated momentum; one state an element, in 32 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.optim.kernels import KernelRule, kernel_state, kernel_step
from nanochat.optim.options import betas
from nanochat.optim.quantized import BLOCK, SMALL, absmax_like, codes_like, decode, encode, rounding_of, spans
from nanochat.optim.rule import Group, Rule, State, in_float32, zeros_like


def lion_step(parameter: Tensor, gradient: Tensor, momentum: Tensor, group: Group) -> None:
    """u = sign(b1 m + (1 - b1) g); p <- p (1 - lr wd) - lr u; m <- b2 m + (1 - b2) g. All float32, in place."""
    beta1, beta2 = group["betas"]
    if group["weight_decay"]:
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
    parameter.add_(gradient.lerp(momentum, beta1).sign_(), alpha=-group["lr"])
    momentum.lerp_(gradient, 1.0 - beta2)


class Lion(Rule):
    """Lion with 32-bit momentum."""

    name = "lion"

    class Options:
        """Weights of the momentum in the update and in the next momentum."""

        betas: tuple[float, float] = betas(0.9, 0.99)

    def splits(self, group: Group, shapes: Sequence[torch.Size]) -> bool:
        return True

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        return {"momentum": zeros_like(parameter)}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            with in_float32(parameter) as wide:
                flat, flat_grad, momentum = wide.view(-1), gradient.reshape(-1), state["momentum"].view(-1)
                for elements, _ in spans(flat, BLOCK):
                    lion_step(flat[elements], flat_grad[elements].float(), momentum[elements], group)


class Lion8bit(KernelRule):
    """Lion with 8-bit momentum; parameters under 4,096 elements keep a 32-bit one."""

    name = "lion8bit"

    class Options(KernelRule.Options, Lion.Options):
        """Those of Lion, of blocks and of kernels."""

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        if parameter.numel() < SMALL:
            return {"momentum": zeros_like(parameter)}
        if group["kernels"] == "bitsandbytes":
            return kernel_state(parameter, 1)
        absmax = absmax_like(parameter, group["block_size"])
        return {"step": 0, "index": index, "momentum": codes_like(parameter), "momentum_absmax": absmax}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if group["kernels"] == "bitsandbytes" and parameter.numel() >= SMALL:
                kernel_step("lion", parameter, gradient, state, group)
                continue
            with in_float32(parameter) as wide:
                if parameter.numel() < SMALL:
                    lion_step(wide, gradient.float(), state["momentum"], group)
                else:
                    self._step_in_8bit(wide.view(-1), gradient.reshape(-1), state, group)

    @staticmethod
    def _step_in_8bit(parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        state["step"] += 1
        generator = rounding_of(state, group, parameter.device)
        codes = state["momentum"].view(-1)
        for elements, blocks in spans(parameter, group["block_size"]):
            grad, absmax = gradient[elements].float(), state["momentum_absmax"][blocks]
            momentum = decode(codes[elements], absmax, "square", torch.empty_like(grad))
            lion_step(parameter[elements], grad, momentum, group)
            encode(momentum, codes[elements], absmax, "square", generator)
