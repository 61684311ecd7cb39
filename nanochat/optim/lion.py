"""Lion (Chen et al., arXiv:2302.06675): the sign of an interpolated momentum; one state an element, in 32 or 8 bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nanochat.optim.adam8bit import OPTIONS_8BIT, choose_kernels, kernel_state, kernel_step, moved_in_float32
from nanochat.optim.quantized import BLOCK, SMALL, absmax_like, codes_like, decode, encode, rounding_generator, spans
from nanochat.optim.rule import Group, Rule, State


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
    options: ClassVar = {"betas": (0.9, 0.99)}

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        return {"momentum": torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            wide = moved_in_float32(parameter)
            flat, slope, momentum = wide.view(-1), gradient.reshape(-1), state["momentum"].view(-1)
            for elements, _ in spans(flat, BLOCK):
                lion_step(flat[elements], slope[elements].float(), momentum[elements], group)
            if wide is not parameter:
                parameter.copy_(wide)


class Lion8bit(Rule):
    """Lion with 8-bit momentum; parameters under 4,096 elements keep a 32-bit one."""

    name = "lion8bit"
    options: ClassVar = {"betas": (0.9, 0.99), "kernels": "auto", **OPTIONS_8BIT}
    quantized = True

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        choose_kernels(group, parameter)

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        if parameter.numel() < SMALL:
            return Lion().init(parameter, group, index)
        if group["kernels"] == "bitsandbytes":
            return kernel_state(parameter, 1)
        absmax = absmax_like(parameter, group["block_size"])
        return {"step": 0, "index": index, "momentum": codes_like(parameter), "momentum_absmax": absmax}

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if group["kernels"] == "bitsandbytes" and parameter.numel() >= SMALL:
                kernel_step("lion", parameter, gradient, state, group)
                continue
            wide = moved_in_float32(parameter)
            if parameter.numel() < SMALL:
                lion_step(wide, gradient.float(), state["momentum"], group)
            else:
                self._step(wide.view(-1), gradient.reshape(-1), state, group)
            if wide is not parameter:
                parameter.copy_(wide)

    @staticmethod
    def _step(parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
        state["step"] += 1
        generator = None
        if group["stochastic_rounding"]:
            generator = rounding_generator(state["step"], state["index"], parameter.device)
        codes = state["momentum"].view(-1)
        for elements, blocks in spans(parameter, group["block_size"]):
            slope, absmax = gradient[elements].float(), state["momentum_absmax"][blocks]
            momentum = decode(codes[elements], absmax, "square", torch.empty_like(slope))
            lion_step(parameter[elements], slope, momentum, group)
            encode(momentum, codes[elements], absmax, "square", generator)
