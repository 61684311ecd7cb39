"""Compare the nodes of a configuration with the signatures of their `_target_`s."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from nanochat.config.locate import locate
from nanochat.config.schema import NODE_GROUPS, Problem
from nanochat.config.vocabulary import AUTO
from nanochat.errors import did_you_mean

HYDRA_KEYS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}

RUN_SUPPLIES: dict[str, set[str]] = {
    "data": {"tokenizer"},
    "optim": {"named_parameters"},
    "trainer": {"callbacks", "logger", "default_root_dir", "enable_checkpointing"},
}
"""arguments that the run itself gives to the node of a group"""
OBJECTIVE_TAKES = {"config", "seed"}
"""arguments that the run gives to every objective whose constructor has them"""

TAKE_AUTO = {"trainer.precision", "model.vocab_size"}
"""keys that also take `auto`, which the run settles before it calls the target"""

WANDB_INIT = {
    "allow_val_change",
    "config",
    "config_exclude_keys",
    "config_include_keys",
    "entity",
    "force",
    "fork_from",
    "group",
    "job_type",
    "mode",
    "notes",
    "reinit",
    "resume",
    "resume_from",
    "save_code",
    "settings",
    "tags",
}
SUMMARY_WRITER = {"comment", "filename_suffix", "flush_secs", "max_queue", "purge_step"}
OPEN_KEYWORDS: dict[str, set[str]] = {
    "TensorBoardLogger": SUMMARY_WRITER,
    "WandbLogger": WANDB_INIT,
}
"""what targets with `**kwargs` hand on, by the target's name"""


def check_nodes(node: Any, path: str) -> list[Problem]:
    """Problems of every node with a `_target_` in a tree of plain values.

    Args:
        path: the dotted key of `node`.
    """
    if isinstance(node, list):
        return [problem for i, item in enumerate(node) for problem in check_nodes(item, f"{path}.{i}")]
    if not isinstance(node, dict):
        return []
    problems: list[Problem] = []
    if "_target_" in node:
        target, problem = locate(node["_target_"], f"{path}._target_")
        if target is None:
            problems.append(Problem(f"{path}._target_", problem))
        else:
            problems += check_arguments(target, node, path, supplied_to(target, path))
    for key, value in node.items():
        problems += check_nodes(value, f"{path}.{key}")
    return problems


def supplied_to(target: Callable[..., Any], path: str) -> set[str]:
    """The arguments that the run gives to a target at `path`, so that the configuration may not."""
    from nanochat.objectives import Objective

    if inspect.isclass(target) and issubclass(target, Objective):
        return OBJECTIVE_TAKES & set(parameters_of(target)[0])
    return RUN_SUPPLIES.get(path, set())


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a target, and whether it takes keywords that cannot be known.

    A class with `**kwargs` is taken to hand them on to the next class of its method resolution order. Where it has
    names of its own, it may give what that class needs itself.
    """
    parameters = dict(inspect.signature(target).parameters)
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return named, False
    allowed = OPEN_KEYWORDS.get(getattr(target, "__name__", ""))
    if allowed is not None:
        extra = {n: inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in allowed}
        return {**extra, **named}, False
    if inspect.isclass(target):
        optional = bool(named)
        for base in target.__mro__[1:]:
            if base is object or "__init__" not in vars(base):
                continue
            inner = list(inspect.signature(base.__init__).parameters.values())[1:]
            if optional:
                inner = [
                    p.replace(default=None) if p.default is p.empty and "VAR" not in p.kind.name else p for p in inner
                ]
            named = {**{p.name: p for p in inner if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, **named}
            if not any(p.kind is p.VAR_KEYWORD for p in inner):
                return named, False
    return named, True


def check_arguments(
    target: Callable[..., Any], node: Mapping[str, Any], path: str, supplied: set[str]
) -> list[Problem]:
    """Unknown, missing and ill-typed arguments of one node.

    Args:
        supplied: arguments that the run gives, so that the node may not.
    """
    try:
        known, is_open = parameters_of(target)
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    label = node.get("_target_") or f"{target.__module__}.{getattr(target, '__qualname__', target)}"
    problems = []
    positional = node.get("_args_") or []
    taken = list(known)[: len(positional)] if isinstance(positional, list) else []
    offered = [name for name in known if name not in supplied and name not in taken]
    hints = _hints(target)
    for name, value in node.items():
        key = f"{path}.{name}"
        if name in HYDRA_KEYS:
            continue
        if name in supplied and name in known:
            where = f"; use the group {name}" if name in NODE_GROUPS else ""
            problems.append(Problem(key, f"{key} is set by the run itself{where}."))
        elif name not in known:
            if not is_open:
                text = f"{key} is not an argument of {label}{did_you_mean(str(name), offered)}"
                problems.append(Problem(key, text))
        elif name in taken:
            problems.append(Problem(key, f"{key} is given twice: _args_ has it too."))
        elif not (value == AUTO and key in TAKE_AUTO):
            annotation = hints.get(name, Any)
            if not fits(value, annotation):
                problems.append(Problem(key, f"{key}={show(value)} must be {describe(annotation)}."))
    if is_open and hasattr(target, "problems_of"):  # what is behind `**options` is the target's to say
        problems += [Problem(path, text) for text in target.problems_of(node)]  # type: ignore[attr-defined]
    if not node.get("_partial_"):
        for name, parameter in known.items():
            needed = parameter.default is parameter.empty and name not in supplied and name not in taken
            if needed and name not in node:
                key = f"{path}.{name}"
                problems.append(Problem(key, f"{key} is missing: {label} needs it."))
    return problems


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    functions = [target]
    if inspect.isclass(target):
        functions = [base.__init__ for base in reversed(target.__mro__) if "__init__" in vars(base)]
    for function in functions:
        try:
            hints.update(typing.get_type_hints(function))
        except Exception:  # an annotation that exists for type checkers alone: then types are not compared
            continue
    return hints


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, set, frozenset)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value can be meant by an annotation; annotations that are not understood fit everything."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    origin, inner = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation in (str, Path):
        return isinstance(value, str)
    if origin in _SEQUENCES:
        if isinstance(value, str):  # a text is a sequence of texts, and who takes a Sequence may want that
            return origin in (collections.abc.Sequence, collections.abc.Iterable)
        if not isinstance(value, list):
            return False
        items = [i for i in inner if i is not Ellipsis]
        if origin is tuple and Ellipsis not in inner and inner:
            return len(value) == len(items) and all(map(fits, value, items))
        return not items or all(fits(item, items[0]) for item in value)
    if origin in _MAPPINGS:
        return isinstance(value, dict)
    return True


def describe(annotation: Any) -> str:
    """What an annotation allows, for a sentence."""
    origin, inner = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in inner))
    if origin is Literal:
        options = [str(option) for option in inner]
        return f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    if origin in _SEQUENCES:
        counted = origin is tuple and inner and Ellipsis not in inner
        return f"a list of {len(inner)}" if counted else "a list"
    if origin in _MAPPINGS:
        return "a mapping"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
