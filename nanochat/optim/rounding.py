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

from nanochat.optim.quantized import BLOCK, spans
from nanochat.optim.rule import Group, Rule, State

WIDENED = 2**26
"""elements that a GPU widens at a time, which are updated together"""
LOW_BITS = 16
"""of a float32 number, which bfloat16 does without"""


def random_bits(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Numbers `first` to `first + count` of a sequence of random 64-bit integers: (count,) int64.

    Each is a function of the seed and its place, so that any part of the sequence can be drawn by itself. The generator
    is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
    """
    bits = torch.arange(first + 1, first + count + 1, device=device).mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        _fold(bits, shift).mul_(_signed(factor))
    return _fold(bits, 31)


def _fold(bits: Tensor, shift: int) -> Tensor:
    """bits ^= bits >> shift, with zeros coming in where torch's shift copies the sign."""
    return bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_(2 ** (64 - shift) - 1))


def _signed(bits: int) -> int:
    """The 64-bit integer that has the bits of an unsigned one."""
    return bits - 2**64 if bits >= 2**63 else bits


def round_at_random(wide: Tensor, out: Tensor, seed: int, first: int = 0) -> None:
    """Write float32 numbers to a bfloat16 tensor, each as one of its two neighbours there, without a bias.

    What is exact stays as it is.

    Args:
        wide: contiguous.
        out: contiguous, of its shape.
        seed: of this tensor and update; 64 bits, signed.
        first: place of the first number in the whole tensor, of which these may be a part: an element's random bits
            depend on its own place alone.
    """
    flat, target = wide.view(-1), out.view(-1)
    for elements, _ in spans(flat, BLOCK):
        bits = flat[elements].view(torch.int32)
        before, skip = divmod(first + elements.start, 4)  # 64 bits are four numbers of 16
        draws = random_bits(seed, before, -(-(skip + bits.numel()) // 4), bits.device)
        noise = draws.view(torch.int16)[skip : skip + bits.numel()].to(torch.int32).bitwise_and_(2**LOW_BITS - 1)
        # the magnitude's low bits carry into those that stay with the probability that they stand for
        bits = noise.add_(bits).bitwise_and_(-(2**LOW_BITS))
        target[elements].copy_(bits.view(torch.float32))


class Rounding(NamedTuple):
    """How the parameters in bfloat16 of one optimizer are updated.

    Args:
        seed: of the run. The random numbers are a function of it, the parameter's name, the count of its updates and an
            element's place, so that they do not depend on the ranks that share a parameter.
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
        return {"rounding_seed": _hash(self.seed, name, size=7), "rounding_step": 0}

    def step(
        self,
        rule: Rule,
        group: Group,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[State],
        firsts: Sequence[int],
    ) -> None:
        """`rule.step` on float32 values of the parameters, which are rounded after it.

        firsts: of a parameter that is some rows of a whole one, the place of its first element there; else 0.
        """
        for part in _parts(parameters):
            some = [parameters[i] for i in part]
            own = [states[i] for i in part]
            wide = [_widened(p, state) for p, state in zip(some, own, strict=True)]
            rule.step(group, wide, [gradients[i].float() for i in part], own)
            for i, value, state in zip(part, wide, own, strict=True):
                parameter = parameters[i]
                if "rounding_seed" in state:
                    state["rounding_step"] += 1
                    seed = _hash(state["rounding_seed"], state["rounding_step"], size=8)
                    round_at_random(value, parameter, _signed(seed), firsts[i])
                elif "master" in state:
                    parameter.copy_(value)


def _hash(*values: object, size: int) -> int:
    """A number of `size` bytes, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=size).digest(), "little")


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
