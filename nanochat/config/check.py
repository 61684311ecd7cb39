"""Find every problem of a configuration before anything is built or written.

Hydra by itself accepts `+mpt=on`, and an unknown argument of a `_partial_` target only fails when it is called.
`check` therefore compares every key with what takes it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from nanochat.config.features import check_names, check_types, feature_keys, is_node
from nanochat.config.rules import PLAIN_RULES, Values
from nanochat.config.schema import NODE_GROUPS, TARGET_GROUPS, UNRESOLVED, Problem, recipe_batch
from nanochat.config.signatures import check_arguments, check_nodes
from nanochat.config.torch_rules import TORCH_RULES
from nanochat.config.vocabulary import settle_vocabulary
from nanochat.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Checked:
    """A configuration without problems."""

    values: dict[str, Any]
    """plain and resolved, the tokenizer's vocabulary size settled"""
    warnings: list[str]
    """what the user should know, for whoever has a log"""
    auto_batch: bool = False
    """`data.batch_size` is the recipe's, and to be replaced by what fits into the memory"""


def check(cfg: DictConfig) -> Checked:
    """The plain values of a configuration in which no problem is found.

    Nothing is built but on the meta device, and nothing written. What needs torch is only looked at once all else
    is right: importing it takes longer than everything else.

    Raises:
        ConfigError: with one sentence per problem: its key, its value and what is allowed.
    """
    values = _plain_problems(cfg)
    if not values.problems:
        plain = values.plain
        values.problems += check_types(plain)
        values.problems += _check_loss(plain)
        for key in (*TARGET_GROUPS, *NODE_GROUPS, *feature_keys(plain)):
            values.problems += check_nodes(plain.get(key), key)
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # the run builds the same parts again, and then it has a log
        try:
            for rule in TORCH_RULES:
                values.problems += list(rule(values))
        finally:
            logging.disable(before)
    if values.problems:
        raise ConfigError(list(dict.fromkeys(map(str, values.problems))))
    return Checked(values.plain, values.warnings, values.auto_batch)


def plain_problems(cfg: DictConfig) -> list[str]:
    """The problems of a configuration that can be found without torch."""
    return [str(problem) for problem in _plain_problems(cfg).problems]


def _plain_problems(cfg: DictConfig) -> Values:
    problems: list[Problem] = []
    plain = _resolve(cfg, "", problems)
    settle_vocabulary(plain)
    problems += _not_finite(plain)
    problems += check_names(cfg, plain)
    problems += _check_groups(plain)
    values = Values(plain, problems)
    data = plain.get("data")
    if isinstance(data, dict) and data.get("batch_size") == "auto":
        data["batch_size"], values.auto_batch = recipe_batch(), True
    for rule in PLAIN_RULES:
        problems += list(rule(values))
    return values


def _check_loss(plain: dict[str, Any]) -> list[Problem]:
    loss = plain.get("loss")
    if loss is None:
        return []
    if not isinstance(loss, dict):
        return [Problem("loss", f"loss={loss!r} must be a mapping of the loss's options.")]
    from nanochat.objectives import NextToken

    return check_arguments(NextToken, loss, "loss", supplied={"config", "seed"})


def _not_finite(node: Any, path: str = "", ours: bool = True) -> Iterator[Problem]:
    """NaN anywhere, and infinity where it is not for a target of the user's own."""
    if isinstance(node, float) and (math.isnan(node) or (ours and math.isinf(node))):
        yield Problem(path, f"{path}={node} is not a finite number.")
    elif isinstance(node, dict):
        if "_target_" in node:
            ours = str(node["_target_"]).startswith(("nanochat.", "lightning."))
        for key, value in node.items():
            yield from _not_finite(value, f"{path}.{key}" if path else str(key), ours)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _not_finite(value, f"{path}.{i}", ours)


def _check_groups(plain: dict[str, Any]) -> Iterator[Problem]:
    for group in TARGET_GROUPS:
        node = plain.get(group)
        if isinstance(node, dict) and node and not is_node(node):
            yield Problem(group, f"{group} has no _target_, so nothing can be made of it.")
        elif node is not UNRESOLVED and not is_node(node):
            given = f"{group}={node!r}" if group in plain else group
            yield Problem(group, f"{given} is not chosen: a run needs {group}=OPTION (see --help).")
    for group in NODE_GROUPS:
        nodes = plain.get(group)
        if nodes is None or nodes is UNRESOLVED:
            continue
        if not isinstance(nodes, dict):
            text = f"{group}={nodes!r} must be a group of named nodes; choose {group}=OPTION (see --help)."
            yield Problem(group, text)
            continue
        targets = [name for name, node in nodes.items() if is_node(node)]
        for name, node in nodes.items():
            if node is not None and node is not UNRESOLVED and name not in targets:
                text = f"{group}.{name} has no _target_{did_you_mean(str(name), targets)}"
                yield Problem(f"{group}.{name}", text)


def _resolve(node: Any, path: str, problems: list[Problem]) -> Any:
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
                problems.append(Problem(name, f"{name} has no value yet; give it one: {name}=..."))
                values[key] = UNRESOLVED
                continue
            value = node[key]
        except (OmegaConfBaseException, ValueError) as error:
            problems.append(Problem(name, f"{name} cannot be resolved: {_first_line(error)}."))
            values[key] = UNRESOLVED
            continue
        values[key] = _resolve(value, name, problems)
    return values if isinstance(node, DictConfig) else list(values.values())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
