"""The groups and keys of a configuration, what the command line said, and the resolvers that `conf/` uses.

Importing this module registers the resolvers; it needs neither torch nor Lightning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

_INSTALLED = Path(__file__).resolve().parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2] / "conf"
"""the configuration files: inside an installed package, or beside it in a checkout"""

PLAIN_KEYS = ("seed", "task_name", "tags", "ckpt_path", "compile", "loss")
TARGET_GROUPS = ("model", "optim", "schedule", "data", "tokenizer", "trainer")
"""groups that are one node with a `_target_`"""
NODE_GROUPS = ("logger", "callbacks")
"""groups that are named nodes, each with a `_target_` (or null)"""
FEATURES = ("mtp", "collider", "mhc")
"""groups that are added with `+NAME=on`; on when their node has a `_target_` (mhc: more than one stream)"""
RECIPES = ("experiment", "debug")
"""groups that only tune other groups"""


class Unresolved:
    """Stands for a value that could not be had, which has been reported already."""

    def __repr__(self) -> str:
        return "???"


UNRESOLVED = Unresolved()


def choices() -> dict[str, Any]:
    """The option chosen of each group (`{}` outside of a Hydra run)."""
    if not HydraConfig.initialized():
        return {}
    return dict(HydraConfig.get().runtime.choices)


def user_overrides() -> list[str]:
    """What the user wrote on the command line (empty outside of a Hydra run)."""
    if not HydraConfig.initialized():
        return []
    words = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(word) for word in words]  # type: ignore[union-attr]


def key_of(word: str) -> str:
    """The key that an override speaks of."""
    return word.lstrip("+~").partition("=")[0]


def set_by_user(key: str) -> bool:
    """Whether the command line itself gives `key` a value."""
    return any(key_of(word) == key for word in user_overrides())


# ---- resolvers ------------------------------------------------------------------------------------------------------


def _choice(*groups: str) -> str:
    """The first of the groups that is chosen, such as `d20`; `run` outside of a Hydra run."""
    made = choices()
    return next((str(made[group]) for group in groups if made.get(group)), "run")


def _in_sweep() -> bool:
    return HydraConfig.initialized() and str(HydraConfig.get().mode).endswith("MULTIRUN")


def _sweep_name() -> str | None:
    """The name of the sweep's folder; None for a single run."""
    return sweep_folder(HydraConfig.get()).name if _in_sweep() else None


def sweep_folder(hydra: Any) -> Path:
    """The folder of the sweep that a job belongs to.

    From the job's own folder: `sweep.dir` has the time in it, and is resolved anew in a process of the job's own.
    """
    return Path(hydra.runtime.output_dir).parents[len(Path(str(hydra.sweep.subdir)).parts) - 1]


def _run_name(task_name: str) -> str:
    """What a sweep's job has of its own, such as `adamw mtp=on seed=0`; the task's name for a single run."""
    if not _in_sweep():
        return task_name
    own = [word for word in user_overrides() if key_of(word) in _swept_keys()]
    groups = (*TARGET_GROUPS, *RECIPES)
    words = [word.partition("=")[2] if key_of(word) in groups else word.lstrip("+") for word in own]
    return " ".join(words) or HydraConfig.get().job.override_dirname or task_name


def _swept_keys() -> set[str]:
    """The keys with several values on the sweep's own command line, which Hydra keeps in its folder."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        saved = OmegaConf.load(sweep_folder(HydraConfig.get()) / "multirun.yaml")
        words = list(saved.hydra.overrides.task)
    except (OSError, AttributeError):
        return set()
    overrides = OverridesParser.create().parse_overrides(words)
    return {key_of(override.get_key_element()) for override in overrides if override.is_sweep_override()}


def _conf(name: str) -> str:
    """The path of a file of the configuration."""
    return str(CONF / name)


for _name, _resolver in {"choice": _choice, "sweep_name": _sweep_name, "run_name": _run_name, "conf": _conf}.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
