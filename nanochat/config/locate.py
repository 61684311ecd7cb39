"""Find the object of a dotted name, or say in one sentence why there is none."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Callable
from typing import Any

from nanochat.errors import did_you_mean


def locate(name: Any, key: str) -> tuple[Callable[..., Any] | None, str]:
    """The object of a dotted name and "", or None and a sentence that says what is wrong with the name.

    Args:
        key: the dotted key under which the configuration has the name.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        return None, f"{key}={name!r} must be a dotted name, such as package.module.Class."
    parts = name.split(".")
    place: Any = None
    for i, part in enumerate(parts):
        inner = getattr(place, part, None) if place is not None else None
        if inner is None and (place is None or isinstance(place, types.ModuleType)):
            inner, problem = _import(".".join(parts[: i + 1]), key, name)
            if problem:
                return None, problem
        if inner is None:
            return None, f"{key}={name}: {'.'.join(parts[:i])} has no {part!r}{_near(place, part)}"
        place = inner
    if not callable(place):
        return None, f"{key}={name} is a {type(place).__name__} and cannot be called."
    return place, ""


def _import(module: str, key: str, name: str) -> tuple[Any, str]:
    """The module, or None when there is none; a sentence when it exists and fails to import."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            root = module.split(".")[0]
            if error.name == root:
                return None, f"{key}={name}: there is no package {root!r}{_near(None, root)}"
            return None, ""
        return None, f"{key}={name} needs the package {error.name}, which is not installed."
    except Exception as error:  # whatever the user's own file raises
        return None, f"{key}={name}: {module} cannot be imported: {error}."


def _near(place: Any, part: str) -> str:
    if place is None:
        return did_you_mean(part, ["nanochat", "lightning", "torch"])
    names = [n for n in vars(place) if not n.startswith("_")]
    if isinstance(place, types.ModuleType) and hasattr(place, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(place.__path__)]
    return did_you_mean(part, names)
