"""Find every problem of a configuration before anything is built or written.

Hydra by itself accepts `+mpt=on`, and an unknown argument of a `_partial_` target only fails when it is called.
`check` therefore compares every key with what takes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanochat.config.rules import RULES, Values
from nanochat.config.schema import CONF, FEATURES, NODE_GROUPS, PLAIN_KEYS, TARGET_GROUPS, UNRESOLVED, choices
from nanochat.config.signatures import check_arguments, check_nodes
from nanochat.config.vocabulary import settle_vocabulary
from nanochat.errors import ConfigError, did_you_mean


def check(cfg: DictConfig) -> None:
    """Find every problem of a configuration; nothing is built (but on the meta device) and nothing written.

    Raises:
        ConfigError: with one sentence per problem: its key, its value and what is allowed.
    """
    problems: list[str] = []
    plain = _resolve(cfg, "", problems)
    assert isinstance(plain, dict)
    settle_vocabulary(plain)
    problems += _check_top_level(plain)
    problems += _check_loss_node(plain)
    for group in (*TARGET_GROUPS, *NODE_GROUPS, *_features(plain)):
        if isinstance(plain.get(group), dict):
            problems += check_nodes(plain[group], group)
    values = Values(plain, problems)
    for rule in RULES:
        for problem in rule(values):
            values.add(problem)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _check_loss_node(plain: dict[str, Any]) -> list[str]:
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
