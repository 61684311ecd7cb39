"""bitsandbytes' block-wise 8-bit kernels on CUDA (Dettmers et al., arXiv:2110.02861)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.optim.options import choice
from nanochat.optim.quantized import SMALL, Options8bit, absmax_like
from nanochat.optim.rule import Group, Rule, State

KERNEL_BLOCK = 256
"""elements that share a maximum in bitsandbytes' optimizers"""


def _installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


class KernelRule(Rule):
    """A rule with 8-bit states that bitsandbytes has a kernel for."""

    quantized = True

    class Options(Options8bit):
        """Blocks, and whose kernels."""

        kernels: str = choice("auto", "tensor", "bitsandbytes", saved=True)

    def auto(self, device: torch.device) -> dict[str, Any]:
        return {"kernels": "bitsandbytes" if device.type == "cuda" and _installed() else "tensor"}

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        if group["kernels"] == "bitsandbytes" and not _installed():
            raise UserError(
                "kernels=bitsandbytes, but bitsandbytes is not installed; install nanochat[gpu] or use kernels=tensor."
            )

    def splits(self, group: Group, shapes: Sequence[torch.Size]) -> bool:
        """Where no block crosses from one rank's rows to the next one's, and each part is quantised as the whole is."""
        sizes = [shape.numel() for shape in shapes if shape.numel()]
        if sum(sizes) < SMALL:
            return True
        block = KERNEL_BLOCK if group["kernels"] == "bitsandbytes" else group["block_size"]
        whole_blocks = all(size % block == 0 for size in sizes[:-1])
        # random roundings are drawn for a whole tensor at a time
        return whole_blocks and min(sizes) >= SMALL and not group["stochastic_rounding"]


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
