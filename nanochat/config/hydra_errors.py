"""Hydra's own errors in one sentence each, with what the user may have meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from nanochat.config.schema import CONF, FEATURES, key_of
from nanochat.errors import ConfigError, did_you_mean


def groups(folder: Path = CONF) -> list[str]:
    """Names of the configuration's groups."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "hydra")


def refuse(overrides: Sequence[str]) -> None:
    """Refuse overrides at which Hydra crashes, or which it takes for something else.

    Raises:
        ConfigError: with one sentence for each.
    """
    problems = []
    features = set(FEATURES) | set(groups())
    for word in overrides:
        key, _, value = word.partition("=")
        name = key.lstrip("+")
        if key.startswith("+") and "." not in name and value.strip("'\"").lower() in ("null", "none", ""):
            problems.append(f"{word} is not possible: leave it out, or say {key}=off.")
        if name in features and value.startswith("["):
            problems.append(f"{word} would merge several options of one group; choose one, or sweep with -m {key}=A,B.")
        if name == "hydra.searchpath":
            for path in re.findall(r"file://([^,\]\s'\"]+)", value):
                if not Path(path).is_dir():
                    problems.append(f"{word}: there is no folder {path} (seen from {Path.cwd()}).")
    if problems:
        raise ConfigError(problems)


def explain(error: BaseException, overrides: Sequence[str] = (), *, resuming: bool = False) -> str:
    """One sentence for an error that Hydra or OmegaConf raised while composing.

    Args:
        overrides: the command line, to name the word that is wrong.
        resuming: the primary configuration is that of a saved run, in which no group is left to choose.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name} is no valid YAML at line {mark.line + 1}: {error.problem}."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error, overrides)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: overrides are key=value, and values with special characters quoted."
    if found := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        name = found[1].split("@")[0]
        if resuming:
            return f"{_word(name, overrides)}: a resumed run keeps its {name}; change single values ({name}.KEY=VALUE)."
        return _not_chosen(name, overrides)
    if found := re.search(r"Could not override '([^']+)'", text) or re.search(r"Could not delete.*?'([^']+)'", text):
        return _unknown_key(found[1], overrides)
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{found[1]}: several values are a sweep; add -m, or write [a,b] for a list."
    if "Config group override must be a string" in text:
        named = [word for word in overrides if word.partition("=")[0].lstrip("+") in groups()]
        word = next((w for w in named if not isinstance(yaml.safe_load(w.partition("=")[2]), str)), "a group")
        return f"{word}: a group takes the name of one of its options (see --help)."
    if found := re.search(r"force-add of config groups is not supported: '\+\+([^']+)'", text):
        return f"++{found[1]}: a group is added with one plus; write +{found[1]}."
    if found := re.search(r"(\S+) appears more than once in the final defaults list", text):
        group = found[1].split("/")[0].split("@")[0]
        return f"{group} is chosen twice: the experiment chooses it too; write {group}=OPTION without the +."
    if found := re.search(r"Multiple values for ([^\s.]+)", text):
        group = found[1]
        return f"{group} is chosen more than once; choose it once, without a +."
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return f"+{found[1]}: the key exists already; write {found[1]}=VALUE without the +."
    if found := re.search(r"Unable to find (?:or instantiate )?(\S+)", text):
        return f"{found[1]} cannot be found."
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
    lines = [line.strip() for line in (text, str(cause or "")) for line in line.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".") + "."


def _word(key: str, overrides: Sequence[str]) -> str:
    """The override that names `key`, as the user wrote it."""
    return next((word for word in overrides if key_of(word).split("@")[0] == key), key)


def _missing_option(error: MissingConfigException, overrides: Sequence[str]) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    group = group.lstrip("/")
    if not group:
        return f"there is no configuration {option!r} in {CONF}."
    return f"{group}={option}: {group} has no option {option!r}{did_you_mean(option, error.options or [])}"


def _not_chosen(name: str, overrides: Sequence[str]) -> str:
    word = _word(name, overrides)
    value = word.partition("=")[2] or "on"
    if name in groups() or name in FEATURES:
        return f"{word}: {name} is a feature and has to be added with a plus; write +{name}={value}."
    known = [*groups(), *(_keys("", overrides, word) or [])]
    return f"{word}: there is no group {name!r}{did_you_mean(name, known)}"


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    word = _word(key, overrides)
    parent, _, name = key.rpartition(".")
    first = key.split(".")[0]
    if first in FEATURES and not _has_group(first, overrides):
        return f"{word}: {first} is not on; add +{first}=on."
    siblings = _keys(parent, overrides, word)
    if siblings is None:
        return f"{word}: there is no key {key!r}{did_you_mean(key, _all_keys(overrides, word))}"
    near = did_you_mean(name, siblings if parent else [*siblings, *FEATURES])
    if parent:
        near = re.sub(r"mean '(.+)'", rf"mean '{parent}.\1'", near)
    return f"{word}: there is no key {key!r}{near}"


def _has_group(name: str, overrides: Sequence[str]) -> bool:
    return any(re.match(rf"\+?{name}=", word) for word in overrides)


def _composed(overrides: Sequence[str], without: str) -> DictConfig:
    """The configuration with only those overrides that choose groups; the defaults if even that fails."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    chosen = [word for word in overrides if _chooses(word) and word != without]
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for words in (chosen, []):
                try:
                    return hydra.compose("train", words)
                except Exception:
                    continue
        return OmegaConf.create()
    finally:
        GlobalHydra.instance().clear()
        if state is not None:
            GlobalHydra.instance().initialize(state)


def _chooses(word: str) -> bool:
    key, _, value = word.partition("=")
    return key == "hydra.searchpath" or ("." not in key and "," not in value)


def _keys(parent: str, overrides: Sequence[str], without: str) -> list[str] | None:
    """The keys of a node, None when there is no such node."""
    node: Any = _composed(overrides, without)
    for part in filter(None, parent.split(".")):
        node = node._get_node(part) if isinstance(node, DictConfig) else None
    return [str(key) for key in node] if isinstance(node, DictConfig) else None


def _all_keys(overrides: Sequence[str], without: str) -> list[str]:
    def walk(node: Any, path: str) -> Iterable[str]:
        if isinstance(node, DictConfig):
            for key in node:
                name = f"{path}.{key}" if path else str(key)
                yield name
                yield from walk(node._get_node(key), name)

    return list(walk(_composed(overrides, without), ""))
