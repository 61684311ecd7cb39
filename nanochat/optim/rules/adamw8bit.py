"""AdamW with 8-bit moments, block by block (Dettmers et al., arXiv:2110.02861)."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.optim.kernels import KernelRule, kernel_state, kernel_step
from nanochat.optim.quantized import SMALL, absmax_like, codes_like, decode, encode, rounding_of, span_size, spans
from nanochat.optim.rule import Group, State, in_float32
from nanochat.optim.rules.adamw import AdamW, adamw_state, adamw_step


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
    generator = rounding_of(state, group, parameter.device)
    correction1, correction2 = 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5
    p, g = parameter.view(-1), gradient.reshape(-1)
    m_codes, v_codes = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    scratch = torch.empty(3, span_size(p, block), dtype=torch.float32, device=p.device)
    for elements, blocks in spans(p, block):
        size = elements.stop - elements.start
        m, v, other = (row[:size] for row in scratch)
        grad = g[elements].float()
        m_absmax, v_absmax = state["exp_avg_absmax"][blocks], state["exp_avg_sq_absmax"][blocks]
        decode(m_codes[elements], m_absmax, "square", m).lerp_(grad, 1.0 - beta1)
        decode(v_codes[elements], v_absmax, "quartic", v).mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        encode(m, m_codes[elements], m_absmax, "square", generator, other)
        encode(v, v_codes[elements], v_absmax, "quartic", generator, other)
        v.sqrt_().add_(group["eps"] * correction2)
        if decay:
            p[elements].mul_(1.0 - decay)
        p[elements].addcdiv_(m, v, value=-lr * correction2 / correction1)


class AdamW8bit(KernelRule):
    """AdamW with 8-bit moments; parameters under 4,096 elements keep 32-bit ones."""

    name = "adamw8bit"

    class Options(KernelRule.Options, AdamW.Options):
        """Those of AdamW, of blocks and of kernels."""

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
            with in_float32(parameter) as wide:
                adam8bit_step(wide, gradient, state, group, group["lr"], group["lr"] * group["weight_decay"])
