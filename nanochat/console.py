"""What the commands share: options that are checked as they are read."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NoReturn

from nanochat.errors import UserError, did_you_mean

CLOCK = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")
UNITS = re.compile(r"(?:([\d.]+)d)?(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?")
SECONDS = (86400, 3600, 60, 1)
"""of a day, an hour, a minute and a second, as the groups of both"""


class Parser(argparse.ArgumentParser):
    """A command's options; a mistake is a `UserError` of one sentence (exit code 2).

    Args:
        verb: the words after `nanochat`.
        description: what `--help` says first.
        repeats: default of `--repeats`; None leaves out the options of a timing, `--repeats` and `--threads`.
        as_json: with `--json`.
    """

    def __init__(self, verb: str, description: str | None, repeats: int | None = None, *, as_json: bool = True) -> None:
        super().__init__(prog=f"nanochat {verb}", description=description, allow_abbrev=False)
        if repeats is not None:
            self.add_argument("--repeats", type=count, default=repeats, help=f"rounds of each arm ({repeats})")
            self.add_argument("--threads", type=count, default=1, help="threads of torch (1)")
        if as_json:
            self.add_argument("--json", action="store_true", help="print the figures as JSON")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}{'' if message.endswith(('.', '?')) else '.'}")


def count(text: str) -> int:
    """Option type: a whole number of at least 1."""
    return _whole(text, 1)


def count_or_zero(text: str) -> int:
    """Option type: a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    # more than 64 bits would not fit what torch makes of it
    if not text.isascii() or not text.isdigit() or not low <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least {low}")
    return int(text)


def number(text: str) -> float:
    """Option type: a finite number."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a number")
    return value


def seconds(text: str) -> float:
    """Option type: seconds, more than 0."""
    value = _number(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of seconds above 0")
    return value


def shares(text: str) -> list[float]:
    """Option type: numbers in [0, 1) with commas between them."""
    values = [_number(part) for part in text.split(",")]
    if not all(0.0 <= value < 1.0 for value in values):
        raise argparse.ArgumentTypeError(f"{text} must be numbers from 0 to below 1 with commas between them")
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """Option type: one of the names."""

    def check(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no {name!r}{did_you_mean(name, known)}")
        return name

    return check


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Option type: names with commas between them, repeats left out."""
    check = one_of(known)
    return lambda text: list(dict.fromkeys(check(name) for name in text.split(",")))


def duration(value: Any) -> float:
    """The seconds of a length of time as users write it: `8h`, `90m`, `1d12h`, `DD:HH:MM:SS`, a timedelta or its
    arguments.

    Raises:
        UserError: it is none of these, or not above 0.
    """
    text = str(value).strip().lower()
    match = CLOCK.fullmatch(text) or UNITS.fullmatch(text.replace(" ", ""))
    try:
        if isinstance(value, timedelta):
            found = value.total_seconds()
        elif isinstance(value, dict):
            found = timedelta(**value).total_seconds()
        else:
            parts = match.groups() if match else ()
            found = sum(float(part) * unit for part, unit in zip(parts, SECONDS, strict=False) if part)
    except (TypeError, ValueError, OverflowError):
        found = 0.0
    if not found > 0.0:
        raise UserError(f"{value} must be a length of time above 0, such as 8h, 90m, 1h30m or DD:HH:MM:SS.")
    return found


def disk_size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def clock_time(seconds: float) -> str:
    """A duration to read: 3725 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
