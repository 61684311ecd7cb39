"""What an optimizer rule is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nanochat.errors import UserError

State = dict[str, Any]
"""A parameter's state: tensors and numbers"""
Group = dict[str, Any]
"""A group of parameters as in `torch.optim.Optimizer.param_groups`, with the options of its rule"""


FLOPS = 100.0
"""of a matrix product in the time that one number is updated in, roughly, on a CPU as on a GPU"""


class Rule:
    """Update rule of a group. Rules hold no state of their own: everything is in `Group` and `State`.

    A subclass gives its `Options` (see `nanochat.optim.options`), which become a frozen dataclass, and the methods
    `init` and `step`. A config's `rule:` names it by its dotted path, `mypackage.rules.MyRule`, or, where it stands in
    `nanochat.optim.rules`, by its `name`.
    """

    name: ClassVar[str]
    """what saved states and messages call it; the dotted path where a class does not say"""
    quantized: ClassVar[bool] = False
    """states are quantised: a gradient with NaN or Inf must never reach them"""

    @dataclass(frozen=True)
    class Options:
        """None of its own."""

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}.{cls.__qualname__}"
        if "__dataclass_fields__" not in vars(cls.Options):  # a second time would lose the checks
            dataclass(frozen=True)(cls.Options)

    def auto(self, device: torch.device) -> dict[str, Any]:
        """Option -> the value that `auto` stands for on a device."""
        return {}

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        """Raise `UserError` when a parameter cannot have this rule with the group's options."""

    def set_progress(self, group: Group, step: int, max_steps: float) -> None:
        """Set what else follows the step, such as a momentum during its warm-up; called when the rates are set."""

    def cost(self, group: Group, parameter: Tensor) -> float:
        """What an update costs, in element-wise updates of one number: by it the ranks share the parameters out."""
        return float(parameter.numel())

    def splits(self, group: Group, shapes: Sequence[torch.Size]) -> bool:
        """Whether each rank may update its own rows of a parameter by itself, with a state of these rows.

        Only where the rule treats every element alone, and where the ranks' states, one below the other, are that of
        the whole parameter. Otherwise the parameter travels to its owner, whole.

        shapes: of the ranks' parts, which are consecutive rows; the last ones may have none.
        """
        return False

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        """The state before the first step. Must work on the meta device, since a load compares with it.

        index: the parameter's place in the group.
        """
        raise NotImplementedError

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        """Update every parameter by its gradient, in place, without a host sync."""
        raise NotImplementedError


def check_matrix(group: Group, name: str, parameter: Tensor) -> None:
    """Raise `UserError` for a parameter that is not a matrix, in a group whose rule is for matrices alone."""
    if parameter.ndim != 2:
        raise UserError(
            f"parameter {name} has {parameter.ndim} dimensions, but rule {group['rule']} of "
            f"optim.groups.{group['name']} updates matrices only; say `ndim: 2` and give it another group."
        )


def zeros_like(parameter: Tensor) -> Tensor:
    """Contiguous float32 zeros in the shape of a parameter."""
    return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)


@contextmanager
def in_float32(parameter: Tensor) -> Iterator[Tensor]:
    """The parameter as contiguous float32, to be updated in place; written back where that is a copy."""
    same = parameter.dtype == torch.float32 and parameter.is_contiguous()
    wide = parameter if same else parameter.float().contiguous()
    yield wide
    if not same:
        parameter.copy_(wide)
