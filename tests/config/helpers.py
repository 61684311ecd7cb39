"""What the tests of configurations share: targets, and the problems of a command line."""

from __future__ import annotations

from typing import Any, Literal

from lightning import Callback

from nanochat.config.compose import compose
from nanochat.errors import ConfigError


def problems(*overrides: str) -> list[str]:
    """Everything that is wrong with a configuration."""
    try:
        compose(overrides)
    except ConfigError as error:
        return error.problems
    return []


class Demo(Callback):
    """A target."""

    def __init__(self, heads: int, name: str | None = None, scale: float = 1.0, parts: list[Any] | None = None) -> None:
        self.heads = heads


class Open(Demo):
    """Hands its keywords on."""

    def __init__(self, extra: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Strict:
    """Knows a few words."""

    def __init__(self, mode: Literal["min", "max"] = "min") -> None: ...
