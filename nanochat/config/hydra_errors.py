"""Errors of Hydra and OmegaConf that are left once the overrides have been checked, in one sentence each."""

from __future__ import annotations

import yaml
from hydra.errors import MissingConfigException

from nanochat.errors import did_you_mean


def explain(error: BaseException) -> str:
    """One sentence for an error that Hydra or OmegaConf raised while composing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name} is not valid YAML at line {mark.line + 1}: {error.problem}."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).lstrip("/").rpartition("/")
        if not group:
            return f"there is no configuration {option!r} on the search path."
        return f"{group}={option}: {group} has no option {option!r}{did_you_mean(option, error.options or [])}"
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
    lines = [line.strip() for line in (str(error), str(cause or "")) for line in line.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".") + "."
