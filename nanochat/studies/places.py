"""Paths on a page: as they were typed, or seen from the working folder, so that a page tells nothing of the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def from_here(value: Any) -> Any:
    """A JSON value in whose texts the paths below the working folder are relative."""
    here = os.getcwd().rstrip("/")
    return (
        _mapped(value, re.compile(rf"(?<![\w./~-]){re.escape(here)}(/(?=[^\s'\"])|(?![\w-]|\.\w))")) if here else value
    )


def _mapped(value: Any, here: re.Pattern[str]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(child, here) for key, child in value.items()}
    if isinstance(value, list):
        return [_mapped(child, here) for child in value]
    return here.sub(lambda found: "" if found[1] else ".", value) if isinstance(value, str) else value


def as_typed(value: Any, overrides: Sequence[str]) -> Any:
    """A configuration's value in which absolute paths are what the overrides say, whose end they are.

    A run resolves the paths it is given. One that no override names keeps at most its last two parts.
    """
    if isinstance(value, dict):
        return {key: as_typed(child, overrides) for key, child in value.items()}
    if isinstance(value, list):
        return [as_typed(child, overrides) for child in value]
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    parts = value.strip("/").split("/")
    ends = (value, *("/".join(parts[i:]) for i in range(1, len(parts))))
    return next((end for end in ends if any(end in word for word in overrides)), "/".join(["…", *parts[-2:]]))


def name_of(folder: Path, root: Path) -> str:
    """A folder seen from here; one that lies elsewhere begins with the name of the folder `root` above it."""
    seen = os.path.relpath(folder)
    if not seen.startswith(".."):
        return seen
    below = os.path.relpath(folder, root)
    return root.resolve().name if below == "." else os.path.join(root.resolve().name, below)
