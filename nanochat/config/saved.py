"""The configuration that a run folder holds, which may be a stranger's.

A resume builds what the saved configuration names, with the arguments it gives: anything callable, were it not looked
at first. Without the user's trust a saved configuration may only name nanochat's parts and Lightning's, and whatever
the user's own `--config-dir`, `hydra.searchpath` or command line names today; it reads nothing from the environment,
and names no place outside of its run folder that would be written to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from nanochat.config.locate import locate
from nanochat.config.renamed import rename_targets
from nanochat.config.schema import DEFAULTS, PLAIN_KEYS, key_of
from nanochat.errors import ConfigError, UserError

PACKAGES = ("nanochat.", "lightning.")
"""whose parts a saved configuration may name"""
CODE = re.compile(r"(^|\.)(_target_|rule|corpus)(\.|$)")
"""keys whose values are imported; a rule or a corpus only where it is a dotted name"""
CACHES = ("cache_dir", "cache")
"""how arguments of nanochat's own parts are called that name folders to write to"""
PLACES = re.compile(r"(dir|path|root|folder|uri)$")
"""how arguments are called that name a place"""
TRUST = "say --trust if you know where the folder comes from."


@dataclass
class SavedConfig:
    """The configuration of a run folder, and what the user says today.

    Args:
        folder: the run's folder.
        name: as the user wrote it.
        words: the rest of the command line.
        trusted: whether to believe all that it says.
    """

    folder: Path
    name: str
    words: Sequence[str]
    trusted: bool = False

    def __post_init__(self) -> None:
        # Hydra merges a mapping into what is there; every other value replaces it
        replacing = [w for w in self.words if w.startswith("~") or not w.partition("=")[2].lstrip().startswith("{")]
        self._given = {key_of(word) for word in replacing if not word.startswith("-")}

    def read(self) -> dict[str, Any]:
        """Its values, with today's names; nothing that they name has been imported.

        Raises:
            UserError: it is missing, or is not the configuration of a run.
            ConfigError: it names what it may not.
        """
        problem = f"--resume {self.name}: its config.yaml"
        try:
            saved = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"), resolve=False)
        except FileNotFoundError as error:
            raise UserError(
                f"--resume {self.name}: it has no config.yaml, so it is not the folder of a run."
            ) from error
        except Exception as error:
            raise UserError(f"{problem} cannot be read: {error}.") from error
        if not isinstance(saved, dict) or "model" not in saved:
            raise UserError(f"{problem} is not the configuration of a run.")
        if strange := sorted({"hydra", "defaults"} & set(saved)):
            raise UserError(f"{problem} sets {' and '.join(strange)}, which no run of nanochat writes.")
        saved = rename_targets({str(key): value for key, value in saved.items()})
        if not self.trusted:
            self._refuse([*self._named(saved), *self._written(saved)])
        return saved

    def check_overrides(self, overrides: Sequence[str]) -> None:
        """Compare the overrides of a saved sweep with what a saved configuration may say.

        Raises:
            ConfigError: they name code, or a place outside of the folder that would be written to.
        """
        tree: dict[str, Any] = {}
        for override in overrides:
            node, (*parents, last) = tree, key_of(override).replace("/", ".").split(".")
            for parent in parents:
                if not isinstance(node.get(parent), dict):
                    node[parent] = {}
                node = node[parent]
            node[last] = _parsed(override.partition("=")[2])
        self._refuse([*self._named(tree), *self._written(tree)])

    def check_types(self, saved: dict[str, Any]) -> None:
        """Compare what is named with the kinds of parts that a run is made of; this imports nanochat and Lightning.

        Raises:
            ConfigError: something named is none of them, such as a module that nanochat happens to import.
        """
        if not self.trusted:
            self._refuse(list(self._not_parts(saved)))

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise ConfigError([f"--resume {self.name}: {problem}" for problem in dict.fromkeys(problems)])

    def _untrusted(self, saved: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Keys and values that the command line does not replace."""
        for key, value in _leaves(saved):
            parts = key.split(".")
            if not any(".".join(parts[: i + 1]) in self._given for i in range(len(parts))):
                yield key, value

    def _named(self, saved: dict[str, Any]) -> Iterator[str]:
        """What is named beyond nanochat, Lightning and the user's own."""
        own = names_of(self.words)
        yield from (
            f"the name {key!r} of a value has a dot, which no run of nanochat writes." for key in _dotted(saved)
        )
        for key, value in self._untrusted(saved):
            if "${" in str(value):
                yield f"{key}={value} is an interpolation, which no run of nanochat writes; {TRUST}"
            elif "_args_" in key.split("."):
                yield f"{key}={value} is given by position, so nothing says what it is; {TRUST}"
            elif CODE.search(key) and _is_foreign(key, value) and value not in own:
                unknown = "neither nanochat's nor named by your own options"
                yield f"{key}={value} is {unknown}, and would be run; give the --config-dir that names it, or {TRUST}"

    def _written(self, saved: dict[str, Any]) -> Iterator[str]:
        """Places outside of the run folder that would be written to."""
        for key, value in self._untrusted(saved):
            if not isinstance(value, str):
                continue
            name = key.rpartition(".")[2]
            if name in CACHES:
                outside = not (_is_cache(value) or self._inside(value))
            else:
                outside = self._is_place(key, name, value, saved) and not self._inside(value)
            if outside:
                yield f"{key}={value} is outside of the run folder, and would be written to; give another, or {TRUST}"

    def _is_place(self, key: str, name: str, value: str, saved: dict[str, Any]) -> bool:
        """Whether a text names a place that a part of a run may write to; nanochat's own write to its folder alone."""
        if key.partition(".")[0] in {*PLAIN_KEYS, *DEFAULTS} - {"logger", "callbacks", "trainer"}:
            return False
        if name == "_target_" or _target_above(saved, key).startswith("nanochat."):
            return False
        return bool(PLACES.search(name)) or "/" in value or os.sep in value or value.startswith("~") or value == ".."

    def _inside(self, value: str) -> bool:
        place = Path(os.path.realpath(os.path.expanduser(value)))
        return place.is_relative_to(os.path.realpath(self.folder))

    def _not_parts(self, saved: dict[str, Any]) -> Iterator[str]:
        from lightning import Callback, LightningDataModule, Trainer
        from lightning.pytorch.loggers import Logger
        from lightning.pytorch.profilers import Profiler

        from nanochat.data.tokenizer import BPE, GPT2, Byte
        from nanochat.model import GPTConfig
        from nanochat.objectives import Objective
        from nanochat.optim import Rule, build
        from nanochat.optim.schedule import Schedule

        parts = (Callback, LightningDataModule, Trainer, Logger, Profiler, BPE, GPT2, Byte, GPTConfig, Objective,
                 Rule, Schedule)  # fmt: skip
        own = names_of(self.words)
        for key, value in self._untrusted(saved):
            if not CODE.search(key) or value in own or not str(value).startswith(PACKAGES):
                continue
            found, problem = locate(value, key)
            if problem or (key == "data.corpus" and isinstance(found, type) and hasattr(found, "fingerprint")):
                continue  # `check` reports the one; the other is a corpus
            is_part = found is build or (isinstance(found, type) and issubclass(found, parts))
            if not is_part or not str(getattr(found, "__module__", "")).startswith(PACKAGES):
                yield f"{key}={value} is not a part of a run, and would be called; {TRUST}"


def names_of(words: Sequence[str]) -> set[str]:
    """What the command line names to be imported, itself or in the files of its folders of options."""
    named, folders = set(), []
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd") and (equals or i + 1 < len(words)):
            folders.append(value if equals else words[i + 1])
        elif flag.lstrip("+") == "hydra.searchpath":
            folders += re.findall(r"file://([^,\]'\"]+)", value)
        elif not word.startswith("-"):
            tree = _parsed(value)
            named |= _names({key_of(word): tree})
    for folder in folders:
        for path in Path(folder).glob("**/*.yaml"):
            try:
                tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            named |= _names({path.parent.name: tree, **(tree if isinstance(tree, dict) else {})})
    return named


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _names(tree: Any) -> set[str]:
    return {value for key, value in _leaves(tree) if CODE.search(key) and isinstance(value, str)}


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a tree; an empty mapping or list has none."""
    items: Collection[tuple[Any, Any]]
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        yield path, node
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _target_above(saved: dict[str, Any], key: str) -> str:
    """The target of the innermost node that takes the value at a key; empty where there is none."""
    node: Any = saved
    target = ""
    for part in key.split(".")[:-1]:
        node = node[int(part)] if isinstance(node, list) else node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and "_target_" in node:
            target = str(node["_target_"])
    return target


def _is_foreign(key: str, value: Any) -> bool:
    """Whether a name to import is neither nanochat's nor Lightning's."""
    if "_target_" in key.split("."):
        return not str(value).startswith(PACKAGES)
    return isinstance(value, str) and "." in value and not value.startswith(PACKAGES)


def _dotted(node: Any) -> Iterator[str]:
    """Names in a tree that would make one dotted key look like another."""
    if isinstance(node, dict):
        yield from (str(key) for key in node if "." in str(key))
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _dotted(child)


def _is_cache(value: str) -> bool:
    """Whether a folder is nanochat's cache, or has been used as one of prepared data or of losses."""
    place = Path(os.path.expanduser(value))
    default = os.path.expanduser(os.environ.get("NANOCHAT_CACHE") or "~/.cache/nanochat")
    return os.path.realpath(place) == os.path.realpath(default) or any(
        any(place.glob(files)) for files in ("data/*/header.json", "[0-9a-f]*-[0-9]*.bin")
    )
