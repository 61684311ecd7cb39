"""The groups and keys of a configuration, what the command line said, and the resolvers that `conf/` uses.

Importing this module registers the resolvers; it needs neither torch nor Lightning.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nanochat.files import shown

_INSTALLED = Path(__file__).resolve().parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[2] / "conf"
"""the configuration files: inside an installed package, or beside it in a checkout"""

PLAIN_KEYS = (
    *("seed", "task_name", "tags", "ckpt_path", "compile", "activation_checkpointing", "weights", "rank_timeout"),
    *("offload_optimizer", "loss"),
)
TARGET_GROUPS = ("model", "optim", "schedule", "data", "tokenizer", "trainer")
"""groups that are one node with a `_target_`"""
NODE_GROUPS = ("logger", "callbacks")
"""groups that are named nodes, each with a `_target_` (or null)"""
NOTHING_TO_MINIMISE = "a sweeper minimises val/bpb, and this run has none"
DEFAULT_BATCH = 8
"""sequences of a micro-batch where no file says"""
RECIPES = ("experiment", "debug")
"""groups that only tune other groups"""
DEFAULTS = (*TARGET_GROUPS, *NODE_GROUPS, *RECIPES)
"""groups of the defaults list; any other group is a feature, added with `+NAME=OPTION`"""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a configuration."""

    key: str
    """dotted key of the value that is wrong"""
    text: str
    """one sentence for the user"""

    def __str__(self) -> str:
        return self.text


class Unresolved:
    """Stands for a value that cannot be resolved and has been reported already."""

    def __repr__(self) -> str:
        return "???"


UNRESOLVED = Unresolved()


# ---- the files ------------------------------------------------------------------------------------------------------


def group_options(folders: Iterable[Path]) -> dict[str, set[str]]:
    """The groups in some folders of configuration files, and the options of each; Hydra's own left out."""
    options: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.glob("*/**/*.yaml"):
            group = path.parent.relative_to(folder).as_posix()
            if group.partition("/")[0] != "hydra":
                options.setdefault(group, set()).add(path.stem)
    return options


def search_path(sources: Iterable[str]) -> list[Path]:
    """The folders among entries of a search path such as `file:///folder` (`pkg://` entries are left to Hydra)."""
    return [
        Path(source.removeprefix("file://")) for source in sources if not source.startswith(("pkg:", "structured:"))
    ]


def features() -> set[str]:
    """Names of the features that the files of this run define, a user's own among them."""
    folders = [CONF]
    if HydraConfig.initialized():
        sources = HydraConfig.get().runtime.config_sources
        folders += search_path(source.path for source in sources if source.schema == "file")
    return set(group_options(folders)) - set(DEFAULTS)


# ---- the command line -----------------------------------------------------------------------------------------------


def choices() -> dict[str, Any]:
    """The option chosen of each group (`{}` outside of a Hydra run)."""
    if not HydraConfig.initialized():
        return {}
    return dict(HydraConfig.get().runtime.choices)


def user_overrides() -> list[str]:
    """What the user wrote on the command line (empty outside of a Hydra run)."""
    if not HydraConfig.initialized():
        return []
    overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(override) for override in overrides]  # type: ignore[union-attr]


def recipe_batch() -> int:
    """`data.batch_size` of the recipe, or of the data's option, that this run has chosen, whatever the user says."""
    folders, made = [CONF], choices()
    if HydraConfig.initialized():
        folders += search_path(s.path for s in HydraConfig.get().runtime.config_sources if s.schema == "file")
    keys = [(group, "data.batch_size") for group in reversed(RECIPES)] + [("data", "batch_size")]
    for group, key in keys:
        for folder in reversed(folders):
            path = folder / group / f"{made.get(group)}.yaml"
            value = OmegaConf.select(OmegaConf.load(path), key) if path.is_file() else None
            if isinstance(value, int):
                return value
    return DEFAULT_BATCH


def key_of(override: str) -> str:
    """The key of an override."""
    return override.lstrip("+~").partition("=")[0]


def keys_of_user() -> list[str]:
    """The keys that the command line itself gives values."""
    return [key_of(override) for override in user_overrides()]


def set_by_user(key: str) -> bool:
    """Whether the command line itself gives `key` a value."""
    return key in keys_of_user()


def places_of_user() -> list[str]:
    """The words of the command line that name folders of options of the user's own, for a further command."""
    if not HydraConfig.initialized():
        return []
    words = []
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            words.append(f"--config-dir {shlex.quote(shown(Path(source.path)))}")
        elif source.provider == "hydra.searchpath in command-line":
            words.append(shlex.quote(f"hydra.searchpath=[{source.schema}://{source.path}]"))
    return words


# ---- resolvers ------------------------------------------------------------------------------------------------------


def _choice(*groups: str) -> str:
    """The first of the groups that is chosen, such as `d20`; `run` outside of a Hydra run."""
    made = choices()
    return next((str(made[group]) for group in groups if made.get(group)), "run")


def in_sweep() -> bool:
    """Whether this run is a job of a sweep."""
    return HydraConfig.initialized() and str(HydraConfig.get().mode).endswith("MULTIRUN")


def sweeper_minimises() -> bool:
    """Whether this run is a job of a sweeper that looks for the lowest value, such as Optuna's."""
    return in_sweep() and not str(HydraConfig.get().sweeper._target_).endswith(".BasicSweeper")


def _sweep_name() -> str | None:
    """The sweep's folder with the one above it, which is its date; None for a single run."""
    return " ".join(sweep_folder(HydraConfig.get()).absolute().parts[-2:]) if in_sweep() else None


def sweep_folder(hydra: Any) -> Path:
    """The folder of the sweep that a job belongs to.

    From the job's own folder: `sweep.dir` has the time in it, and is resolved anew in a process of the job's own.
    """
    return Path(hydra.runtime.output_dir).parents[len(Path(str(hydra.sweep.subdir)).parts) - 1]


def _run_name(task_name: str) -> str:
    """What a sweep's job has of its own, such as `adamw mtp=on seed=0`; the task's name for a single run."""
    if not in_sweep():
        return task_name
    swept = swept_keys()
    own = [override for override in user_overrides() if key_of(override) in swept]
    groups = (*TARGET_GROUPS, *RECIPES)
    parts = [override.partition("=")[2] if key_of(override) in groups else override.lstrip("+") for override in own]
    return " ".join(parts) or HydraConfig.get().job.override_dirname or task_name


def swept_keys() -> set[str]:
    """The keys with several values on the sweep's own command line, which Hydra keeps in its folder; none otherwise."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not in_sweep():
        return set()
    try:
        saved = OmegaConf.load(sweep_folder(HydraConfig.get()) / "multirun.yaml")
        parts = list(saved.hydra.overrides.task)
    except (OSError, AttributeError):
        return set()
    overrides = OverridesParser.create().parse_overrides(parts)
    return {key_of(override.get_key_element()) for override in overrides if override.is_sweep_override()}


def _conf(name: str) -> str:
    """The path of a file of the configuration."""
    return str(CONF / name)


for _name, _resolver in {"choice": _choice, "sweep_name": _sweep_name, "run_name": _run_name, "conf": _conf}.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
