"""Composing a configuration for commands that do not train, and making Hydra's own settings current for a check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from nanochat.config.check import check
from nanochat.config.hydra_errors import explain, refuse
from nanochat.config.schema import CONF
from nanochat.config.vocabulary import settle_vocabulary
from nanochat.errors import ConfigError


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


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of a run as plain values, for commands that do not train.

    Args:
        overrides: as on train.py's command line.

    Raises:
        ConfigError: when an override, or the configuration that results, has problems.
    """
    import hydra

    refuse(overrides)
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", list(overrides), return_hydra_config=True)
    except Exception as error:
        raise ConfigError(explain(error, overrides)) from error
    with hydra_settings(cfg) as task:
        check(task)
        return plain_values(task)


def plain_values(cfg: DictConfig) -> dict[str, Any]:
    """A checked configuration as plain values, its tokenizer's size among them."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    settle_vocabulary(values)
    return values
