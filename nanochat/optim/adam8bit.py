"""AdamW with 8-bit moments: a tensor version for every device, bitsandbytes' kernels on CUDA where installed.

Block-wise 8-bit optimizers: Dettmers et al., arXiv:2110.02861.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.optim.adamw import adamw_state, adamw_step
from nanochat.optim.quantized import (
    BLOCK,
    SMALL,
    absmax_like,
    codes_like,
    decode,
    encode,
    rounding_generator,
    span_size,
    spans,
)
from nanochat.optim.rule import Group, Rule, State

KERNEL_BLOCK = 256
"""elements that share a maximum in bitsandbytes' optimizers"""


def adam8bit_state(parameter: Tensor, group: Group, index: int) -> State:
    """Two moments in 8 bits, about 2 bytes an element."""
    return {
        "step": 0,
        "index": index,
        "exp_avg": codes_like(parameter),
        "exp_avg_absmax": absmax_like(parameter, group["block_size"]),
        "exp_avg_sq": codes_like(parameter),
        "exp_avg_sq_absmax": absmax_like(parameter, group["block_size"]),
    }


@torch.no_grad()
def adam8bit_step(parameter: Tensor, gradient: Tensor, state: State, group: Group, lr: float, decay: float) -> None:
    """p <- p (1 - decay) - lr m / (sqrt(v) + eps) with moments from and to 8 bits; parameter contiguous."""
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step, block = state["step"], group["block_size"]
    generator = rounding_generator(step, state["index"], parameter.device) if group["stochastic_rounding"] else None
    correction1, correction2 = 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5
    p, g = parameter.view(-1), gradient.reshape(-1)
    m_codes, v_codes = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    scratch = torch.empty(3, span_size(p, block), dtype=torch.float32, device=p.device)
    for elements, blocks in spans(p, block):
        size = elements.stop - elements.start
        m, v, other = (row[:size] for row in scratch)
        slope = g[elements].float()
        m_absmax, v_absmax = state["exp_avg_absmax"][blocks], state["exp_avg_sq_absmax"][blocks]
        decode(m_codes[elements], m_absmax, "square", m).lerp_(slope, 1.0 - beta1)
        decode(v_codes[elements], v_absmax, "quartic", v).mul_(beta2).addcmul_(slope, slope, value=1.0 - beta2)
        encode(m, m_codes[elements], m_absmax, "square", generator, other)
        encode(v, v_codes[elements], v_absmax, "quartic", generator, other)
        v.sqrt_().add_(group["eps"] * correction2)
        if decay:
            p[elements].mul_(1.0 - decay)
        p[elements].addcdiv_(m, v, value=-lr * correction2 / correction1)


def moved_in_float32(parameter: Tensor) -> Tensor:
    """The parameter as contiguous float32: itself where it is, else a copy that the caller writes back."""
    return (
        parameter if parameter.dtype == torch.float32 and parameter.is_contiguous() else parameter.float().contiguous()
    )


def choose_kernels(group: Group, parameter: Tensor) -> None:
    """Settle a group's `kernels: auto`: bitsandbytes' on CUDA where it is installed, else the tensor version."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if group["kernels"] == "auto":
        group["kernels"] = "bitsandbytes" if parameter.is_cuda and installed else "tensor"
    elif group["kernels"] == "bitsandbytes" and not installed:
        raise UserError(
            "kernels=bitsandbytes, but bitsandbytes is not installed; install nanochat[gpu] or use kernels=tensor."
        )


@cache
def _code_map(signed: bool, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map  # type: ignore

    return create_dynamic_map(signed=signed).to(device)


def kernel_state(parameter: Tensor, moments: int) -> State:
    """State in bitsandbytes' layout: uint8 codes of its dynamic maps and a maximum for each block of 256."""
    state: State = {"step": 0}
    for i in range(1, moments + 1):
        state[f"state{i}"] = torch.zeros_like(parameter, dtype=torch.uint8, memory_format=torch.contiguous_format)
        state[f"absmax{i}"] = absmax_like(parameter, KERNEL_BLOCK)
    return state


def kernel_step(method: str, parameter: Tensor, gradient: Tensor, state: State, group: Group) -> None:
    """One step of bitsandbytes' block-wise kernel `adam` or `lion`."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise  # type: ignore

    state["step"] += 1
    second: dict[str, Any] = {"state2": None, "qmap2": None, "absmax2": None}
    if "state2" in state:
        second = {"state2": state["state2"], "qmap2": _code_map(False, parameter.device), "absmax2": state["absmax2"]}
    optimizer_update_8bit_blockwise(
        method,
        gradient.contiguous(),
        parameter,
        state["state1"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        beta3=0.0,
        alpha=0.0,
        eps=group.get("eps", 0.0),
        step=state["step"],
        lr=group["lr"],
        qmap1=_code_map(True, parameter.device),
        absmax1=state["absmax1"],
        weight_decay=group["weight_decay"],
        **second,
    )


OPTIONS_8BIT = {"block_size": BLOCK, "stochastic_rounding": False}


class AdamW8bit(Rule):
    """AdamW with 8-bit moments; parameters under 4,096 elements keep 32-bit ones."""

    name = "adamw8bit"
    options: ClassVar = {"betas": (0.9, 0.95), "eps": 1e-8, "kernels": "auto", **OPTIONS_8BIT}
    quantized = True

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        choose_kernels(group, parameter)

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        if parameter.numel() < SMALL:
            return adamw_state(parameter)
        if group["kernels"] == "bitsandbytes":
            return kernel_state(parameter, 2)
        return adam8bit_state(parameter, group, index)

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        small = [i for i, p in enumerate(parameters) if p.numel() < SMALL]
        adamw_step(group, *([values[i] for i in small] for values in (parameters, gradients, states)))  # type: ignore[arg-type]
        for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
            if parameter.numel() < SMALL:
                continue
            if group["kernels"] == "bitsandbytes":
                kernel_step("adam", parameter, gradient, state, group)
                continue
            wide = moved_in_float32(parameter)
            adam8bit_step(wide, gradient, state, group, group["lr"], group["lr"] * group["weight_decay"])
            if wide is not parameter:
                parameter.copy_(wide)
