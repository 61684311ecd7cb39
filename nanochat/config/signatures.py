"""Compare the nodes of a configuration with the signatures of their `_target_`s."""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from nanochat.config.schema import UNRESOLVED
from nanochat.errors import did_you_mean

HYDRA_KEYS = {"_target_", "_args_", "_partial_", "_recursive_", "_convert_"}

SUPPLIED: dict[str, set[str]] = {
    "data": {"tokenizer"},
    "optim": {"named_parameters"},
    "trainer": {"callbacks", "logger", "default_root_dir", "enable_checkpointing"},
    "mtp": {"config", "seed"},
    "collider": {"config", "seed"},
    "mhc": {"config", "seed"},
}
"""arguments that the run itself gives to the node of a group"""

AUTO = {"trainer.precision", "model.vocab_size"}
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
OPEN_KEYWORDS: dict[str, set[str]] = {
    "WandbLogger": WANDB_INIT,
}
"""what targets with `**kwargs` hand on, by the target's name"""


def check_nodes(node: Any, path: str) -> list[str]:
    """Problems of every node with a `_target_` in a tree of plain values.

    Args:
        path: the dotted key of `node`.
    """
    if isinstance(node, list):
        return [problem for i, item in enumerate(node) for problem in check_nodes(item, f"{path}.{i}")]
    if not isinstance(node, dict):
        return []
    problems: list[str] = []
    if "_target_" in node:
        name = node["_target_"]
        if name is not UNRESOLVED:
            target, problem = locate(name, f"{path}._target_")
            if problem:
                problems.append(problem)
            else:
                assert target is not None
                problems += check_arguments(target, node, path, SUPPLIED.get(path, set()))
    for key, value in node.items():
        problems += check_nodes(value, f"{path}.{key}")
    return problems


def locate(name: Any, key: str) -> tuple[Callable[..., Any] | None, str]:
    """The object of a dotted name and "", or None and a sentence about what is wrong with the name."""
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        return None, f"{key}={name!r} must be a dotted name, such as package.module.Class."
    parts = name.split(".")
    place: Any = None
    for i, part in enumerate(parts):
        found = ".".join(parts[: i + 1])
        if place is not None and not isinstance(place, types.ModuleType):
            inner = getattr(place, part, None)
        else:
            inner = getattr(place, part, None) if place is not None else None
            if inner is None:
                inner, problem = _import(found, key, name)
                if problem:
                    return None, problem
        if inner is None:
            return None, f"{key}={name}: {'.'.join(parts[:i])} has no {part!r}{_near(place, part)}"
        place = inner
    if not callable(place):
        return None, f"{key}={name} is a {type(place).__name__} and cannot be called."
    return place, ""


def _import(module: str, key: str, name: str) -> tuple[Any, str]:
    """The module, or None when there is none; a sentence when it exists and fails to import."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            root = module.split(".")[0]
            if error.name == root:
                return None, f"{key}={name}: there is no package {root!r}{_near(None, root)}"
            return None, ""
        return None, f"{key}={name} needs the package {error.name}, which is not installed."
    except ImportError as error:
        return None, f"{key}={name} cannot be imported: {error}."


def _near(place: Any, part: str) -> str:
    if place is None:
        return did_you_mean(part, ["nanochat", "lightning", "torch"])
    names = [n for n in vars(place) if not n.startswith("_")]
    if isinstance(place, types.ModuleType) and hasattr(place, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(place.__path__)]
    return did_you_mean(part, names)


def parameters_of(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a target, and whether it takes keywords that cannot be known.

    A class with `**kwargs` is taken to hand them on to the next class of its method resolution order.
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
        for base in target.__mro__[1:]:
            if base is object or "__init__" not in vars(base):
                continue
            inner = list(inspect.signature(base.__init__).parameters.values())[1:]
            named = {**{p.name: p for p in inner if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, **named}
            if not any(p.kind is p.VAR_KEYWORD for p in inner):
                return named, False
    return named, True


def check_arguments(target: Callable[..., Any], node: Mapping[str, Any], path: str, supplied: set[str]) -> list[str]:
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
            where = {"callbacks": "; use the group callbacks", "logger": "; use the group logger"}.get(name, "")
            problems.append(f"{key} is set by the run itself{where}.")
        elif name not in known:
            if not is_open:
                problems.append(f"{key} is no argument of {label}{did_you_mean(str(name), offered)}")
        elif name in taken:
            problems.append(f"{key} is given twice: _args_ has it too.")
        elif value is not UNRESOLVED and not (value == "auto" and key in AUTO):
            annotation = hints.get(name, Any)
            if not fits(value, annotation):
                problems.append(f"{key}={_shown(value)} must be {describe(annotation)}.")
    if is_open and hasattr(target, "problems_of"):  # what is behind `**options` is the target's to say
        problems += target.problems_of(node)  # type: ignore[attr-defined]
    if not node.get("_partial_"):
        for name, parameter in known.items():
            needed = parameter.default is parameter.empty and name not in supplied and name not in taken
            if needed and name not in node:
                problems.append(f"{path}.{name} is missing: {label} needs it.")
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


def _shown(value: Any) -> str:
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
    if value is UNRESOLVED or (isinstance(value, dict) and "_target_" in value):
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
    """An annotation in words."""
    origin, inner = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in inner))
    if origin is Literal:
        words = [str(word) for word in inner]
        return f"one of {', '.join(words)}" if len(words) > 1 else words[0]
    if origin in _SEQUENCES:
        counted = origin is tuple and inner and Ellipsis not in inner
        return f"a list of {len(inner)}" if counted else "a list"
    if origin in _MAPPINGS:
        return "a mapping"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
