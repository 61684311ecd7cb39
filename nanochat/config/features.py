"""Features: what `+NAME=OPTION` adds to a run. What a feature is, its `_target_`'s type says.

An `Objective` is a term of the loss, a Lightning `Callback` takes part in training; a node without a `_target_` gives
values that another part of the configuration reads (`streams: ${oc.select:mhc.streams,1}`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from nanochat.config.locate import locate
from nanochat.config.schema import (
    NODE_GROUPS,
    PLAIN_KEYS,
    TARGET_GROUPS,
    Problem,
    choices,
    features,
    keys_of_user,
    set_by_user,
)
from nanochat.config.signatures import supplied_to
from nanochat.errors import did_you_mean

OFF = "off"
"""the option of a feature that takes no part, under which an experiment may leave values"""
RESERVED = {"next_token"}
"""names of the module's own objectives"""


def feature_keys(plain: dict[str, Any]) -> list[str]:
    """The top-level keys that are neither the run's own nor groups of the defaults list."""
    return [key for key in plain if key not in (*PLAIN_KEYS, *TARGET_GROUPS, *NODE_GROUPS, "rate_scale")]


def feature_nodes(plain: dict[str, Any], kind: type) -> dict[str, dict[str, Any]]:
    """The features of a configuration that are of a type (objectives, callbacks), in the order they were given in."""
    nodes = {key: plain[key] for key in feature_keys(plain) if is_node(plain[key])}
    return {key: node for key, node in nodes.items() if _is(get_object(node["_target_"]), kind)}


def build_objective(node: dict[str, Any], **supplied: Any) -> Any:
    """An objective, given those of the supplied arguments (`config`, `seed`) that its constructor has."""
    takes = supplied_to(get_object(node["_target_"]), "")
    # in two calls, since Hydra's own first parameter is named config, too
    return instantiate(node, _partial_=True)(**{name: value for name, value in supplied.items() if name in takes})


def is_node(value: Any) -> bool:
    """Whether a value is a mapping with a `_target_`."""
    return isinstance(value, dict) and "_target_" in value


def _is(target: Any, kind: type) -> bool:
    return isinstance(target, type) and issubclass(target, kind)


def check_names(cfg: DictConfig, plain: dict[str, Any]) -> Iterator[Problem]:
    """Features without a `_target_` that nothing reads, and keys that are not features at all; needs no torch."""
    known, made = features(), choices()
    resumed = bool(made) and "model" not in made  # a saved configuration: groups are chosen, references resolved
    for key in feature_keys(plain):
        node, option = plain[key], made.get(key)
        if is_node(node):
            continue
        if isinstance(node, dict) and (resumed or option == OFF):
            continue
        if key not in known:
            if not (resumed and node is None):
                hint = did_you_mean(key, {*PLAIN_KEYS, *TARGET_GROUPS, *NODE_GROUPS, *known})
                yield Problem(key, f"{key} is not a key of the configuration{hint}")
        elif node is not None and not isinstance(node, dict):
            yield Problem(key, f"{key}={node!r} must be a mapping; a feature is added with +{key}=OPTION.")
        elif option is None:
            if node and made:
                yield Problem(key, f"{key}.{next(iter(node))} is set, but {key} is not on; add +{key}=on.")
        elif not node:
            yield Problem(key, f"+{key}={option} takes no part in the run: the option has no values.")
        else:
            read = _references(OmegaConf.to_container(cfg, resolve=False), key)
            for name in node:
                if str(name) in read:
                    continue
                instead = _given_instead(f"{key}.{name}")
                if instead:
                    text = f"{instead} is given, so that {key}.{name}={node[name]} of +{key}={option} takes no part"
                    yield Problem(instead, f"{text}; give {key}.{name}, which sets it.")
                else:
                    hint = did_you_mean(str(name), read) if read else "; it has no _target_."
                    yield Problem(f"{key}.{name}", f"{key}.{name} takes no part in the run: nothing reads it{hint}")


def _given_instead(key: str) -> str | None:
    """The user's own value, of a name like the key's, that stands where the key would be read."""
    name = key.rpartition(".")[2]
    given = [] if set_by_user(key) else keys_of_user()
    return next((k for k in given if k.partition(".")[0] in TARGET_GROUPS and name in k.rpartition(".")[2]), None)


def _references(node: Any, feature: str) -> set[str]:
    """The keys of a feature that interpolations elsewhere in a configuration read."""
    if isinstance(node, str):
        found = re.findall(rf"\b{re.escape(feature)}\.(\w+)", " ".join(re.findall(r"\$\{[^}]*\}", node)))
        return set(found)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return {name for child in children for name in _references(child, feature)}


def check_types(plain: dict[str, Any]) -> Iterator[Problem]:
    """Features, callbacks and loggers whose targets are of no type that takes part in a run."""
    from lightning import Callback
    from lightning.pytorch.loggers import Logger

    from nanochat.objectives import Objective

    for key in feature_keys(plain):
        if not is_node(plain[key]):
            continue
        target, problem = locate(plain[key]["_target_"], f"{key}._target_")
        if problem:
            continue  # `check_nodes` reports it
        if not _is(target, Objective) and not _is(target, Callback):
            name = plain[key]["_target_"]
            text = f"{name} is neither an Objective nor a Callback, so it would take no part in the run."
            yield Problem(f"{key}._target_", f"{key}._target_={text}")
        elif _is(target, Objective) and key in RESERVED:
            yield Problem(key, f"{key} is the name of the run's own loss; give the objective another name.")
    for group, kind in (("callbacks", Callback), ("logger", Logger)):
        for name, node in (plain.get(group) or {}).items():
            if not is_node(node):
                continue
            target, problem = locate(node["_target_"], f"{group}.{name}._target_")
            if not problem and isinstance(target, type) and not issubclass(target, kind):
                text = f"{group}.{name}._target_={node['_target_']} is not a {kind.__name__}."
                yield Problem(f"{group}.{name}._target_", text)
