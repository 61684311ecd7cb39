"""Where text comes from.

Each corpus is one file of this package, named as `data.corpus` names it, with its class as `CORPUS`: a new one is that
file, one YAML in conf/data and one test. `data.corpus` may also be the dotted path of a class outside of nanochat. What
a class has to offer is `Corpus`; its arguments are checked by name, like every argument of the configuration.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

from nanochat.config.locate import locate
from nanochat.data.sources.base import Corpus, Document, Skipped
from nanochat.errors import ConfigError, did_you_mean

__all__ = ["Corpus", "Document", "Skipped", "build", "find", "names", "reads_paths"]


@cache
def names() -> list[str]:
    """The corpora of this package, by the names that `data.corpus` takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


@cache
def find(name: str) -> Callable[..., Corpus]:
    """The class that `data.corpus=NAME` means: one of `names()`, or a dotted path.

    Raises:
        ConfigError: there is no such corpus, or the class lacks a method of `Corpus`.
    """
    if name in names():
        return importlib.import_module(f"{__name__}.{name}").CORPUS
    if "." not in name:
        hint = did_you_mean(name, names())
        raise ConfigError(f"data.corpus={name} is not a corpus or the dotted path of a class{hint}")
    found, problem = locate(name, "data.corpus")
    if problem:
        raise ConfigError(problem)
    missing = [method for method in ("documents", "fingerprint") if not callable(getattr(found, method, None))]
    if missing or not inspect.isclass(found):
        raise ConfigError(f"data.corpus={name} is not a corpus: it needs the methods documents and fingerprint.")
    return cast(Callable[..., Corpus], found)


def reads_paths(name: str) -> bool:
    """Whether a corpus reads files that the user names (its class has an argument `paths`)."""
    return "paths" in inspect.signature(find(name)).parameters


def build(name: str, paths: Sequence[str], option: str, options: Mapping[str, Any]) -> Corpus:
    """The corpus `data.corpus=NAME`.

    Args:
        paths: the user's files, folders and globs; only for a class that reads them.
        option: the option that named them, for messages.
        options: further arguments; those that are None are left to the class.

    Raises:
        ConfigError: an argument that the class does not have or cannot use, or one that it lacks.
    """
    kind = find(name)
    known = inspect.signature(kind).parameters
    given = {key: value for key, value in options.items() if value is not None}
    if reads_paths(name):
        given["paths"] = paths
        if "option" in known:
            given["option"] = option
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if unknown := [] if open_ended else [key for key in given if key not in known]:
        offered = [key for key in known if key not in ("paths", "option")]
        raise ConfigError(
            [f"data.{key} is not an option of data.corpus={name}{did_you_mean(key, offered)}" for key in unknown]
        )
    try:
        inspect.signature(kind).bind(**given)
    except TypeError as error:
        raise ConfigError(f"data.corpus={name}: {error}.") from error
    return kind(**given)
