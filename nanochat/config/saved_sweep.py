"""The command line that a sweep's folder holds, which may be a stranger's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nanochat.config.saved import TRUST, SavedConfig
from nanochat.config.schema import key_of
from nanochat.config.sweep_file import SavedSweep
from nanochat.errors import ConfigError, UserError
from nanochat.files import quoted

OURS = re.compile(r"hydra\.(sweep\.dir|run\.dir|mode)$")
"""Hydra's settings that a resume gives anew"""
HARMLESS = re.compile(
    r"hydra/(launcher|sweeper)$|hydra\.sweep\.subdir$|hydra\.sweeper\.(max_batch_size|n_trials|seed|batch|pruner|prune_after_trials|prune_after_validations)$"
    r"|hydra\.launcher\.(n_jobs|timeout_min|cpus_per_task|gpus_per_node|mem_gb|nodes|tasks_per_node|array_parallelism)$"
)
"""Hydra's settings that a stranger's sweep may make"""


def resumed(folder: Path, name: str, saved: SavedSweep, rest: Sequence[str], trusted: bool) -> list[str]:
    """The command line that goes on with a sweep, to be run in the sweep's working folder if that is still there.

    Args:
        name: the folder as the user wrote it. rest: the rest of the command line.
        trusted: whether to believe all that the folder says.

    Raises:
        UserError: the rest changes the jobs.
        ConfigError: the sweep names what only `--trust` allows.
    """
    own = [word for word in rest if not word.startswith("-") and not key_of(word).startswith("hydra")]
    values = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word in ("--config-dir", "-cd")]
    if own := [word for word in own if word not in values]:
        raise UserError(f"--resume {name}: a sweep keeps its overrides ({own[0]}); start another one for other jobs.")
    given = {key_of(word) for word in rest}
    settings = [word for word in saved.hydra if not OURS.match(key_of(word)) and key_of(word) not in given]
    for plugin in ("launcher", "sweeper"):
        if f"hydra/{plugin}" in given:  # another one does not know the options of the first
            settings = [word for word in settings if not key_of(word).startswith(f"hydra.{plugin}.")]
    if not trusted:
        if strange := [word for word in settings if not HARMLESS.match(key_of(word)) or "${" in word]:
            raise ConfigError(f"--resume {name}: {strange[0]} is a setting of Hydra's; give it again, or {TRUST}")
        SavedConfig(folder, name, rest).check_overrides(saved.task)
    here = saved.cwd
    place = folder.relative_to(here) if here is not None and folder.is_relative_to(here) else folder
    return ["-m", *saved.task, *settings, *rest, f"hydra.sweep.dir={quoted(place)}"]
