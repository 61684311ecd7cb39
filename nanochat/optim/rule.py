"""What an optimizer rule is, and the options that rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from nanochat.errors import UserError

State = dict[str, Any]
"""A parameter's state: tensors and numbers"""
Group = dict[str, Any]
"""A group of parameters as in `torch.optim.Optimizer.param_groups`"""


class Rule:
    """How the parameters of a group move. Rules hold no state of their own: everything is in `Group` and `State`.

    Subclasses give `name` (as in a config's `rule:`), `options` (name -> default) and the two methods.
    """

    name: str
    options: ClassVar[Mapping[str, Any]] = {}
    quantized = False
    """states are quantised: a gradient with NaN or Inf must never reach them"""

    def check(self, group: Group, name: str, parameter: Tensor) -> None:
        """Raise `UserError` when a parameter cannot have this rule with the group's options."""

    def init(self, parameter: Tensor, group: Group, index: int) -> State:
        """The state before the first step. Must work on the meta device, since a load compares with it.

        index: the parameter's place in the group.
        """
        raise NotImplementedError

    def step(self, group: Group, parameters: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
        """Move every parameter by its gradient, in place."""
        raise NotImplementedError


def check_options(rule: Rule, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rule's options with defaults filled in, as plain values.

    where: for messages, e.g. `optim.groups.matrices`. Raises `UserError` for unknown names and bad values.
    """
    unknown = sorted(set(options) - set(rule.options))
    if unknown:
        known = ", ".join(sorted(rule.options)) or "none"
        raise UserError(f"{where}: rule {rule.name} has no option {unknown[0]!r}; its options are {known}.")
    values = {**rule.options, **{k: v for k, v in options.items() if v is not None}}
    return {name: check_option(name, value, f"{where}.{name}={value!r}") for name, value in values.items()}


def check_matrix(group: Group, name: str, parameter: Tensor) -> None:
    """Raise `UserError` for a parameter that is no matrix, in a group whose rule moves only those."""
    if parameter.ndim != 2:
        raise UserError(
            f"parameter {name} has {parameter.ndim} dimensions, but rule {group['rule']} of "
            f"optim.groups.{group['name']} moves matrices only; say `ndim: 2` and give it another group."
        )


def number(value: Any, what: str, low: float = 0.0, high: float = math.inf, *, open_end: bool = False) -> float:
    """A finite number in [low, high], or [low, high) with `open_end`; raises `UserError` naming `what`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (open_end and value == high):
        limits = f"in [{low:g}, {high:g}{')' if open_end else ']'}" if math.isfinite(high) else f"of at least {low:g}"
        raise UserError(f"{what} must be a number {limits}.")
    return float(value)


def _whole(value: Any, what: str, low: int, high: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high:,}"
        raise UserError(f"{what} must be a whole number {limits}.")
    return value


def _positive(value: Any, what: str) -> float:
    if number(value, what) == 0.0:
        raise UserError(f"{what} must be more than 0: elements without a gradient would divide zero by zero.")
    return float(value)


def _switch(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{what} must be true or false.")
    return value


def _betas(value: Any, what: str) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f"{what} must be two numbers.")
    first, second = (number(beta, what + " (each of the two)", 0.0, 1.0, open_end=True) for beta in value)
    return first, second


def _choice(*choices: str) -> Callable[[Any, str], str]:
    def check(value: Any, what: str) -> str:
        if value not in choices:
            raise UserError(f"{what} is unknown; choose one of {', '.join(choices)}.")
        return value

    return check


def _rank(value: Any, what: str) -> int | float | str:
    if value == "full":
        return value
    if isinstance(value, float) and 0.0 < value < 1.0:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise UserError(f"{what} must be a whole number of at least 1, a fraction of the shorter side, or full.")


def _beta(value: Any, what: str) -> float:
    return number(value, what, 0.0, 1.0, open_end=True)


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "betas": _betas,
    "eps": _positive,
    "momentum": _beta,
    "momentum_start": _beta,
    "momentum_warmup": lambda value, what: _whole(value, what, 0),
    "nesterov": _switch,
    "ema": _switch,
    "ns_steps": lambda value, what: _whole(value, what, 1),
    "newton_schulz": _choice("classic", "polar_express"),
    "adjust": _choice("original", "match_rms"),
    "row_equilibration": _switch,
    "normuon_beta": _beta,
    "cautious_weight_decay": _switch,
    "block_size": lambda value, what: _whole(value, what, 16, 2**24),
    "stochastic_rounding": _switch,
    "rank": _rank,
    "update_period": lambda value, what: _whole(value, what, 1),
    "power_iterations": lambda value, what: _whole(value, what, 0),
    "oversampling": lambda value, what: _whole(value, what, 0),
    "scale": lambda value, what: number(value, what),
    "kernels": _choice("auto", "tensor", "bitsandbytes"),
    "norm_growth_limit": lambda value, what: number(value, what, 1.0),
}


def check_option(name: str, value: Any, what: str) -> Any:
    """A value of the option `name`, converted to plain types; raises `UserError` naming `what`."""
    return None if value is None else _CHECKS[name](value, what)
