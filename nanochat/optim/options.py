"""The options of a rule: the fields of a frozen dataclass, each with its default and what it accepts.

@dataclass(frozen=True)
class Options:
    momentum: float = number(0.95, 0.0, 1.0, open_end=True)
    nesterov: bool = switch(True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field, fields
from functools import partial
from typing import Any

from nanochat.errors import UserError, did_you_mean


def option(default: Any, check: Callable[[Any, str], Any], *, saved: bool = False, absent: Any = None) -> Any:
    """A field with a check of its own.

    Args:
        check: (value, what to call it) -> the value as a plain type; raises `UserError`.
        saved: it decides what a saved state means, so that a run resumes with the same value only.
        absent: the value of states that were saved before there was such an option.
    """
    return field(default=default, metadata={"check": check, "saved": saved, "absent": absent})


def number(default: float | None, low: float = 0.0, high: float = math.inf, *, open_end: bool = False) -> Any:
    """A number in [low, high], or [low, high) with `open_end`."""
    return option(default, partial(check_number, low=low, high=high, open_end=open_end))


def positive(default: float) -> Any:
    """A number above 0."""

    def check(value: Any, what: str) -> float:
        if check_number(value, what) == 0.0:
            raise UserError(f"{what} must be more than 0: elements without a gradient would divide zero by zero.")
        return float(value)

    return option(default, check)


def whole(default: int | None, low: int = 0, high: int | None = None, *, saved: bool = False) -> Any:
    """A whole number of at least `low`, or from `low` to `high`."""

    def check(value: Any, what: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high:,}"
            raise UserError(f"{what} must be a whole number {limits}.")
        return value

    return option(default, check, saved=saved)


def switch(default: bool | None) -> Any:
    """True or false."""

    def check(value: Any, what: str) -> bool:
        if not isinstance(value, bool):
            raise UserError(f"{what} must be true or false.")
        return value

    return option(default, check)


def choice(default: str, *others: str, saved: bool = False, absent: str | None = None) -> Any:
    """One of some names."""
    return option(default, partial(check_choice, choices=(default, *others)), saved=saved, absent=absent)


def betas(first: float, second: float) -> Any:
    """Two decay rates in [0, 1)."""

    def check(value: Any, what: str) -> tuple[float, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
            raise UserError(f"{what} must be two numbers.")
        return tuple(check_number(beta, what + " (each of the two)", 0.0, 1.0, open_end=True) for beta in value)

    return option((first, second), check)


def check_number(value: Any, what: str, low: float = 0.0, high: float = math.inf, *, open_end: bool = False) -> float:
    """A finite number in [low, high], or [low, high) with `open_end`; raises `UserError` naming `what`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (open_end and value == high):
        limits = f"in [{low:g}, {high:g}{')' if open_end else ']'}" if math.isfinite(high) else f"of at least {low:g}"
        raise UserError(f"{what} must be a number {limits}.")
    return float(value)


def check_choice(value: Any, what: str, choices: Sequence[str]) -> str:
    """One of the choices; raises `UserError` naming `what`."""
    if value not in choices:
        raise UserError(f"{what} is unknown; choose one of {', '.join(choices)}.")
    return value


def option_fields(options: type) -> dict[str, Field[Any]]:
    """Name -> field of a dataclass of options."""
    return {one.name: one for one in fields(options)}


def read_options(options: type, given: Mapping[str, Any], where: str, owner: str, also: Sequence[str] = ()) -> dict:
    """The given options that are not null, as plain values.

    Args:
        options: the dataclass. where: the dotted key of `given`. owner: who has these options, for messages.
        also: further names that may have been meant.

    Raises `UserError` for unknown names and bad values.
    """
    known, values = option_fields(options), {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}.{name} is not an option of {owner}{did_you_mean(str(name), (*known, *also))}")
        if value is not None:
            check = known[name].metadata.get("check")
            values[name] = check(value, f"{where}.{name}={value!r}") if check else value
    return values
