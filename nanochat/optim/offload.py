"""Optimizer state in the CPU's memory: it visits the GPU for the update of its parameters, and goes back.

On the GPU there is then no more of it than that of the parameters that are updated together: of matrices of one shape
as many as a rule stacks, else one parameter. All that a rule computes it computes on the GPU, as ever, so that an
update is the same to the last bit. Each byte of state crosses the bus twice in a step, which accumulation makes rare.

Not torchao's CPUOffloadOptimizer: that one updates on the CPU, where Newton-Schulz and projections would take longer
than a step, sends every gradient there and every weight back, and has an optimizer of torch's for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat.optim.rule import State
from nanochat.optim.rules.muon import buckets

SMALLEST = 2**14
"""elements of a tensor below which it stays: hundreds of copies would take longer, and free next to nothing"""


def leaves(device: torch.device) -> bool:
    """Whether states of parameters on a device have another memory to go to."""
    return device.type == "cuda"


class Away(dict[str, Any]):
    """A parameter's state whose large tensors are in the CPU's memory, page-locked, whatever device they come from.

    A tensor that is set is copied into the one that is there, without waiting for the device: who reads the state on
    the host waits first (`torch.cuda.synchronize`). Lightning moves an optimizer's states to the GPU after a load by
    setting each of them: they stay here.

    Args:
        device: where the parameter is; small tensors go there.
        state: what to take over, as copies.
    """

    def __init__(self, device: torch.device, state: Mapping[str, Any]) -> None:
        super().__init__()
        self.device = device
        for key, value in state.items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        there = self.get(key)
        if value is there:
            return
        if isinstance(value, Tensor):
            if isinstance(there, Tensor) and there.shape == value.shape and there.dtype == value.dtype:
                there.copy_(value, non_blocking=True)
                return
            value = self._kept(value)
        super().__setitem__(key, value)

    def _kept(self, value: Tensor) -> Tensor:
        if value.numel() < SMALLEST:
            return value.to(self.device, copy=True)
        kept = torch.empty_like(
            value, device="cpu", memory_format=torch.contiguous_format, pin_memory=self.device.type == "cuda"
        )
        return kept.copy_(value)

    def away(self) -> Iterator[Tensor]:
        """The tensors in the CPU's memory."""
        return (value for value in self.values() if isinstance(value, Tensor) and value.numel() >= SMALLEST)

    def visiting(self) -> State:
        """The state with copies of these on the device."""
        large = {id(value) for value in self.away()}
        return {
            key: value.to(self.device, non_blocking=True, copy=True) if id(value) in large else value
            for key, value in self.items()
        }


def visits(
    parameters: list[Tensor], gradients: list[Tensor], states: list[State]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[State]]]:
    """(parameters, gradients, states) to update at a time, the states on the parameters' device; new states go back.

    What is small comes first, all together. Of the rest the parts are those that `buckets` stacks, so that a rule's
    stacks, and with them its roundings, are what they would be without.
    """
    large = [isinstance(state, Away) and any(True for _ in state.away()) for state in states]
    small = [i for i, is_large in enumerate(large) if not is_large]
    rest = [i for i, is_large in enumerate(large) if is_large]
    if small:
        yield tuple([values[i] for i in small] for values in (parameters, gradients, states))  # type: ignore[misc]
    for bucket in buckets([parameters[i] for i in rest]):
        part = [rest[i] for i in bucket]
        homes = [states[i] for i in part]
        there = [home.visiting() for home in homes]  # type: ignore[attr-defined]
        yield [parameters[i] for i in part], [gradients[i] for i in part], there
        for home, state in zip(homes, there, strict=True):
            for key, value in state.items():
                home[key] = value
