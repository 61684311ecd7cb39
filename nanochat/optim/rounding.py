"""Updates of weights that are kept in bfloat16: computed in float32, then rounded.

A bfloat16 number has 8 bits, and an update of a weight is mostly smaller than half of the last: rounded to the nearest,
the weight would never change. Two ways out:

- *stochastic*: the new weight becomes one of its two neighbours, the nearer one with the higher probability, so that
  its mean is exact. Nothing more is kept: 4 bytes a weight for it and its gradient in place of 8.
- *master*: the optimizer's state holds the weight in float32, too, which is what is updated; the weight is its
  rounding. 2 + 2 + 4 bytes are as many as float32 takes: it is the yardstick of the other one.

Rules see float32 alone: a matrix (on a GPU some of them) is widened, updated and rounded before the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.optim.quantized import BLOCK, rounding_generator, spans
from nanochat.optim.rule import Group, Rule, State

WIDENED = 2**26
"""elements that a GPU widens at a time, which are updated together"""
LOW_BITS = 16
"""of a float32 number, which bfloat16 does without"""


def round_at_random(wide: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Write float32 numbers to a bfloat16 tensor, each as one of its two neighbours there, without a bias.

    wide: contiguous; out: contiguous, of its shape. What is exact stays as it is.
    """
    flat, target = wide.view(-1), out.view(-1)
    for elements, _ in spans(flat, BLOCK):
        bits = flat[elements].view(torch.int32)
        draws = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
        draws.random_(-(2**63), None, generator=generator)  # four numbers of 16 bits
        noise = draws.view(torch.int16)[: bits.numel()].to(torch.int32).bitwise_and_(2**LOW_BITS - 1)
        # the magnitude's low bits carry into those that stay with the probability that they stand for
        bits = noise.add_(bits).bitwise_and_(-(2**LOW_BITS))
        target[elements].copy_(bits.view(torch.float32))


class Rounding(NamedTuple):
    """How the parameters in bfloat16 of one optimizer are updated.

    Args:
        seed: of the run. The random numbers are a function of it, the parameter's name and the count of its updates.
        master: keep float32 copies instead.
    """

    seed: int
    master: bool = False

    def init(self, name: str, parameter: Tensor) -> State:
        """What a parameter's state holds besides that of its rule."""
        if parameter.dtype != torch.bfloat16:
            return {}
        if self.master:
            return {"master": parameter.detach().to(torch.float32, memory_format=torch.contiguous_format)}
        digest = hashlib.blake2b(repr((self.seed, name)).encode(), digest_size=7).digest()
        return {"rounding_seed": int.from_bytes(digest, "little"), "rounding_step": 0}

    def step(
        self,
        rule: Rule,
        group: Group,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[State],
    ) -> None:
        """`rule.step` on float32 values of the parameters, which are rounded after it."""
        for part in _parts(parameters):
            some = [parameters[i] for i in part]
            own = [states[i] for i in part]
            wide = [_widened(p, state) for p, state in zip(some, own, strict=True)]
            rule.step(group, wide, [gradients[i].float() for i in part], own)
            for parameter, value, state in zip(some, wide, own, strict=True):
                if "rounding_seed" in state:
                    state["rounding_step"] += 1
                    generator = rounding_generator(state["rounding_step"], state["rounding_seed"], parameter.device)
                    round_at_random(value, parameter, generator)
                elif "master" in state:
                    parameter.copy_(value)


def _widened(parameter: Tensor, state: State) -> Tensor:
    if "master" in state:
        return state["master"]
    return parameter.detach().to(torch.float32, memory_format=torch.contiguous_format)


def _parts(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices to update at a time: those in float32 together, others as many as may be widened at once."""
    same = [i for i, p in enumerate(parameters) if p.dtype != torch.bfloat16]
    if same:
        yield same
    part: list[int] = []
    size = 0
    for i, parameter in enumerate(parameters):
        if parameter.dtype != torch.bfloat16:
            continue
        limit = 0 if parameter.device.type == "cpu" else WIDENED
        if part and size + parameter.numel() > limit:
            yield part
            part, size = [], 0
        part.append(i)
        size += parameter.numel()
    if part:
        yield part
