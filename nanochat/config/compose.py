"""Composing a configuration for commands that do not train, and making Hydra's own settings current for a check."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from nanochat.config.check import check, plain_problems
from nanochat.config.hydra_errors import explain
from nanochat.config.overrides import COMPOSING, Overrides
from nanochat.errors import ConfigError

log = logging.getLogger(__name__)


@contextmanager
def hydra_settings(cfg: DictConfig) -> Iterator[DictConfig]:
    """Make a composed configuration's `hydra` node the current one; yields the rest without it.

    Hydra itself does so only once the run folder exists, which is too late for a check.
    """
    before = HydraConfig.instance().cfg
    hydra = cfg.hydra
    try:
        HydraConfig.instance().set_config(cfg)
        with read_write(hydra), open_dict(hydra):
            hydra.runtime.output_dir = str(Path(hydra.run.dir).absolute())
        HydraConfig.instance().set_config(cfg)
        task = cfg.copy()
        with read_write(task), open_dict(task):
            del task["hydra"]
        yield task
    finally:
        HydraConfig.instance().cfg = before


def check_overrides(overrides: Overrides) -> None:
    """Find every problem of the overrides, and those of the values that the others give.

    Raises:
        ConfigError: with a sentence for each; only where an override itself is wrong.
    """
    try:
        problems = overrides.check()
        if problems:
            with hydra_settings(overrides.compose()) as task:
                problems += plain_problems(task)
    except COMPOSING as error:
        problems = overrides.problems or [explain(error)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a run as plain values, for commands that do not train.

    Args:
        overrides: as on train.py's command line.

    Raises:
        ConfigError: when an override, or the configuration that results, has problems.
    """
    parsed = Overrides(overrides)
    check_overrides(parsed)
    try:
        cfg = parsed.compose()
    except COMPOSING as error:
        raise ConfigError(explain(error)) from error
    with hydra_settings(cfg) as task:
        checked = check(task)
    for warning in checked.warnings:
        log.warning("%s", warning)
    return checked.values
