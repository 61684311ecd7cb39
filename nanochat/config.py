"""A configuration's way in: composing it, and finding every problem of it before anything is built or written.

Hydra by itself accepts `+mpt=on`, and an unknown argument of a `_partial_` target only fails when it is called.
`check` therefore compares every key with what takes it. Importing this module registers the resolvers that
`conf/` uses; it needs neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from nanochat.errors import ConfigError
from nanochat.messages import did_you_mean

_INSTALLED = Path(__file__).with_name("conf")
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).resolve().parents[1] / "conf"
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


VOCABULARY = 4096
"""tokens of a tokenizer when neither it nor the model says how many"""
SMALLEST_VOCABULARY = 257
"""256 bytes and the token that separates documents"""


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
    return Path(HydraConfig.get().sweep.dir).name if _in_sweep() else None


def _run_name(task_name: str) -> str:
    """The overrides of a sweep's job; the task's name for a single run."""
    return HydraConfig.get().job.override_dirname or task_name if _in_sweep() else task_name


def _conf(name: str) -> str:
    """The path of a file of the configuration."""
    return str(CONF / name)


for _name, _resolver in {"choice": _choice, "sweep_name": _sweep_name, "run_name": _run_name, "conf": _conf}.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)


# ---- composing ------------------------------------------------------------------------------------------------------


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

    from nanochat.hydra_errors import explain, refuse

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


def settle_vocabulary(plain: dict[str, Any]) -> None:
    """Give a tokenizer of size `auto` the model's, in place; `VOCABULARY` where the model's is `auto`, too.

    The other way round, a model of vocabulary `auto` can only be settled once its tokenizer has seen the text.
    """
    tokenizer, model = plain.get("tokenizer"), plain.get("model")
    if isinstance(tokenizer, dict) and tokenizer.get("vocab_size") == "auto":
        size = model.get("vocab_size") if isinstance(model, dict) else None
        tokenizer["vocab_size"] = max(size, SMALLEST_VOCABULARY) if isinstance(size, int) else VOCABULARY


# ---- checking -------------------------------------------------------------------------------------------------------


def check(cfg: DictConfig) -> None:
    """Find every problem of a configuration; nothing is built (but on the meta device) and nothing written.

    Raises:
        ConfigError: with one sentence per problem: its key, its value and what is allowed.
    """
    from nanochat.config_rules import RULES, Values
    from nanochat.config_targets import check_arguments, check_nodes

    problems: list[str] = []
    plain = _resolve(cfg, "", problems)
    assert isinstance(plain, dict)
    settle_vocabulary(plain)
    problems += _check_top_level(plain)
    problems += _check_loss_node(plain, check_arguments)
    for group in (*TARGET_GROUPS, *NODE_GROUPS, *_features(plain)):
        if isinstance(plain.get(group), dict):
            problems += check_nodes(plain[group], group)
    values = Values(plain, problems)
    for rule in RULES:
        for problem in rule(values):
            values.add(problem)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _check_loss_node(plain: dict[str, Any], check_arguments: Any) -> list[str]:
    loss = plain.get("loss")
    if loss is None or loss is UNRESOLVED:
        return []
    if not isinstance(loss, dict):
        return [f"loss={loss!r} must be a mapping of the loss's options."]
    from nanochat.objectives import NextToken

    return check_arguments(NextToken, loss, "loss", supplied={"config", "seed"})


def _features(plain: dict[str, Any]) -> list[str]:
    """Keys of features: ours, and groups that a user's own files add."""
    made = choices()
    known = (*PLAIN_KEYS, *TARGET_GROUPS, *NODE_GROUPS)
    return [key for key in plain if key not in known and (key in FEATURES or key in made)]


def _check_top_level(plain: dict[str, Any]) -> list[str]:
    problems = []
    made = choices()
    features = _features(plain)
    known = {*PLAIN_KEYS, *TARGET_GROUPS, *NODE_GROUPS}
    for key in plain:
        if key not in known and key not in features:
            hint = did_you_mean(key, {*known, *FEATURES})
            problems.append(f"{key} is no key of the configuration{hint}")
    for group in TARGET_GROUPS:
        node = plain.get(group)
        if node is UNRESOLVED:
            continue
        if not isinstance(node, dict) or "_target_" not in node:
            given = f"{group}={node!r}" if group in plain else group
            problems.append(f"{given} is not chosen: a run needs {group}=OPTION (see --help).")
    for group in NODE_GROUPS:
        nodes = plain.get(group)
        if nodes is None or nodes is UNRESOLVED:
            continue
        if not isinstance(nodes, dict):
            problems.append(f"{group}={nodes!r} must be a group of named nodes; choose {group}=OPTION (see --help).")
            continue
        targets = [name for name, node in nodes.items() if isinstance(node, dict) and "_target_" in node]
        for name, node in nodes.items():
            if node is not None and node is not UNRESOLVED and name not in targets:
                problems.append(f"{group}.{name} has no _target_{did_you_mean(str(name), targets)}")
    for feature in features:
        node = plain[feature]
        if node is None or node is UNRESOLVED:
            continue
        if not isinstance(node, dict):
            problems.append(f"{feature}={node!r} is no option of a group {feature}; features are +{feature}=on or off.")
        elif "_target_" not in node:
            problems += _check_untargeted(feature, node, made)
    return problems


def _check_untargeted(feature: str, node: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """A feature that is off (where an experiment's values may be left), or one that only the model reads."""
    path = CONF / feature / "on.yaml"
    defined = OmegaConf.load(path) if path.is_file() else None
    if defined is not None and "_target_" not in defined:
        unknown = [key for key in node if key not in defined]
        return [f"{feature}.{key} is no key of {feature}{did_you_mean(str(key), map(str, defined))}" for key in unknown]
    if node and made and feature not in made:
        return [f"{feature}.{next(iter(node))} is set but {feature} is not on; add +{feature}=on."]
    return []


def _resolve(node: Any, path: str, problems: list[str]) -> Any:
    """Plain values of a node; what cannot be resolved becomes a problem and UNRESOLVED."""
    if isinstance(node, DictConfig):
        keys: Iterable[Any] = list(node.keys())
    elif isinstance(node, ListConfig):
        keys = range(len(node))
    else:
        return node
    values = {}
    for key in keys:
        name = f"{path}.{key}" if path else str(key)
        try:
            child = node._get_node(key)
            if child._is_missing():  # type: ignore[union-attr]
                problems.append(f"{name} has no value yet; give it one: {name}=...")
                values[key] = UNRESOLVED
                continue
            value = node[key]
        except (OmegaConfBaseException, ValueError) as error:
            problems.append(f"{name} cannot be resolved: {_first_line(error)}.")
            values[key] = UNRESOLVED
            continue
        values[key] = _resolve(value, name, problems)
    return values if isinstance(node, DictConfig) else list(values.values())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
