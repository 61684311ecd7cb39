"""Check the overrides of a command line before Hydra sees them.

Hydra names at most one mistake, in words about its defaults list, and accepts some (`+mpt=on`) silently. Here each
override is parsed by Hydra's own parser and compared with the options on disk, then with the keys of the
configuration that the chosen options compose to.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanochat.config.hydra_errors import explain
from nanochat.config.schema import CONF, DEFAULTS, NODE_GROUPS, group_options, search_path
from nanochat.errors import did_you_mean

COMPOSING = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)
"""what Hydra raises for a configuration that cannot be composed"""
NONE = "none"
"""the option of a group of named nodes that has no nodes"""
RESUME = "resume"
"""the primary configuration of `--resume`, which has no groups"""


@dataclass
class Overrides:
    """The overrides of one command line, and the configuration that they change.

    Args:
        given: as typed.
        config_name: the primary configuration.
        config_dir: a further folder of options, as `--config-dir`.
        multirun: whether several values are a sweep.
    """

    given: Sequence[str]
    config_name: str = "train"
    config_dir: str | None = None
    multirun: bool = False
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parsed: list[Override] = []
        parser = OverridesParser.create()
        for word in self.given:
            try:
                self._parsed.append(parser.parse_override(word))
            except HydraException:
                text = "overrides are key=value, with quotes around values that have special characters."
                if word.partition("=")[0].count("//"):
                    text = "a group's options lie in its folder; name a folder of your own with --config-dir FOLDER."
                self.problems.append(f"{word!r} cannot be read: {text}")
        self._searched = self._search_path()
        self._options = group_options([CONF, *search_path(self._searched)])
        self._groups = [o for o in self._parsed if o.key_or_group in self._options]
        self._hydra_groups = [o for o in self._parsed if "/" in o.key_or_group and o not in self._groups]
        self._keys = [o for o in self._parsed if o not in self._groups and o not in self._hydra_groups]

    def compose(self) -> DictConfig:
        """The configuration, with Hydra's own node, of all overrides in which no problem has been found."""
        return self._compose([*self._chosen, *(o for o in self._sound if not o.is_sweep_override())])

    def check(self) -> list[str]:
        """A sentence for each problem of the overrides."""
        self._chosen: list[str] = []
        self._sound: list[Override] = []
        if self.problems and not self._parsed:
            return self.problems
        self.problems += self._check_sweeps()
        usable = [o for o in self._groups if not self._refuse_group(o)]
        first = [_choice(o) for o in usable]
        tree = self._choose(first)
        for other in self._alternatives(first, tree):
            self._check_keys(other)
        return self.problems

    # ---- the parts of a check ---------------------------------------------------------------------------------------

    def _search_path(self) -> list[str]:
        entries = [f"file://{Path(self.config_dir).absolute()}"] if self.config_dir else []
        if self.config_dir and not Path(self.config_dir).is_dir():
            self.problems.append(f"--config-dir {self.config_dir}: there is no such folder.")
            entries = []
        for override in self._parsed:
            if override.key_or_group == "hydra.searchpath" and isinstance(value := override.value(), list):
                for entry in map(str, value):
                    entries.append(entry)
                    for path in search_path([entry]):
                        if not path.is_dir():
                            where = f"there is no folder {path} (seen from {Path.cwd()})."
                            self.problems.append(f"{override.input_line}: {where}")
        return [entry for entry in entries if all(path.is_dir() for path in search_path([entry]))]

    def _check_sweeps(self) -> Iterator[str]:
        for override in self._parsed:
            if override.is_sweep_override() and not self.multirun:
                key = override.get_key_element()
                yield f"{key}: several values are a sweep; add -m, or write [a,b] for a list."

    def _refuse_group(self, override: Override) -> bool:
        """Whether the choice of a group's option is wrong by itself; then says so."""
        group, word = override.key_or_group, str(override.input_line)
        if override.type is OverrideType.DEL:
            return False
        bare = f"{'+' if group not in DEFAULTS else ''}{group}"
        text = ""
        if override.type is OverrideType.FORCE_ADD:
            text = f"a group is added with one plus; write {word[1:]}."
        elif sum(o.get_key_element() == override.get_key_element() for o in self._groups) > 1:
            text = f"{group} is chosen more than once; choose one option."
        else:
            values = _values(override)
            if group in NODE_GROUPS:  # of named nodes, so that several options make one mapping
                alone = next((v for v in values if isinstance(v, list) and NONE in v and len(v) > 1), None)
                values = [item for value in values for item in (value if isinstance(value, list) else [value])]
                if alone is not None:
                    others = ",".join(str(value) for value in alone if value != NONE)
                    text = f"{NONE} does not go with others; write {group}=[{others}], or {group}={NONE}."
            for value in values:
                if isinstance(value, list):
                    text = f"this would merge several options of one group; choose one, or sweep with -m {bare}=A,B."
                elif value is None or value == "":
                    text = f"leave it out, or say +{group}=off." if override.is_add() else ""
                    text = text or "a group takes the name of one of its options (see --help)."
                elif not isinstance(value, str):
                    text = "a group takes the name of one of its options (see --help)."
                elif value.removesuffix(".yaml") not in self._options[group]:
                    text = f"{group} has no option {value!r}{did_you_mean(value, self._options[group])}"
        if text:
            self.problems.append(f"{word}: {text}")
        return bool(text)

    def _choose(self, chosen: list[str]) -> DictConfig:
        """The configuration of the groups' options; one that cannot be chosen is left out, and said."""
        added = [word for word in chosen if word.startswith("+")]
        changed = [word for word in chosen if not word.startswith("+")]
        try:
            tree = self._tree(changed)
            self._chosen = changed
        except COMPOSING:
            tree = self._tree([])
            for word in changed:
                try:
                    tree = self._tree([*self._chosen, word])
                    self._chosen.append(word)
                except COMPOSING as error:
                    self.problems.append(self._not_chosen(word, error))
        made = tree.hydra.runtime.choices
        for word in added:
            group = word[1:].partition("=")[0]
            if made.get(group) is not None:
                option = word.partition("=")[2]
                text = f"{group}={made[group]} is chosen already; write {group}={option} without the +."
                self.problems.append(f"{word}: {text}")
                continue
            try:
                tree = self._tree([*self._chosen, word])
                self._chosen.append(word)
            except COMPOSING as error:
                self.problems.append(explain(error))
        return tree

    def _not_chosen(self, word: str, error: BaseException) -> str:
        if isinstance(error, MissingConfigException | yaml.YAMLError | OSError):
            return explain(error)
        group, _, option = word.lstrip("~").partition("=")
        if self.config_name == RESUME:
            return f"{word}: a resumed run keeps its {group}; change single values ({group}.KEY=VALUE)."
        if group not in DEFAULTS and not word.startswith("~"):
            return f"{word}: {group} is a feature, which is added with a plus; write +{group}={option}."
        return f"{word}: {explain(error)}"

    def _alternatives(self, first: list[str], tree: DictConfig) -> Iterator[DictConfig]:
        """The configuration of the first options, and for each swept group those of its other options."""
        yield tree
        for override in self._groups:
            if not override.is_sweep_override() or (word := _choice(override)) not in self._chosen:
                continue
            for value in _values(override)[1:]:
                place, other = self._chosen.index(word), f"{word.partition('=')[0]}={value}"
                try:
                    yield self._tree([*self._chosen[:place], other, *self._chosen[place + 1 :]])
                except COMPOSING as error:
                    self.problems.append(explain(error))

    def _check_keys(self, tree: DictConfig) -> None:
        added: set[str] = set()
        for override in self._keys:
            key = override.key_or_group
            node = _find(tree, key)
            exists = node is not None or any(key == other or key.startswith(f"{other}.") for other in added)
            text = ""
            if override.is_add():
                added.add(key)
                text = self._refuse_addition(override, tree)
            elif not exists:
                text = self._unknown(key, tree)
            if not text:
                self._sound.append(override)
            elif (sentence := f"{override.input_line}: {text}") not in self.problems:
                self.problems.append(sentence)

    def _refuse_addition(self, override: Override, tree: DictConfig) -> str:
        key, value = override.key_or_group, override.value()
        top = key.partition(".")[0]
        node = _find(tree, key)
        replaces = node is not None and node._value() is not None and not isinstance(value, dict | list)
        if override.type is OverrideType.ADD and replaces:
            return f"the key exists already; write {key}=VALUE without the +."
        if top in tree or any(o.key_or_group == f"{top}._target_" for o in self._keys):
            return ""
        if isinstance(value, dict) and "_target_" in value:
            return ""  # a feature without a file of its own
        return self._unknown(key, tree)

    def _unknown(self, key: str, tree: DictConfig) -> str:
        top = key.partition(".")[0]
        feature_names = set(self._options) - set(DEFAULTS)
        if top in feature_names and top not in tree:
            return f"{top} is not on; add +{top}=on."
        if top not in tree:
            kind = "a key of the configuration"
            return f"{top} is not {kind}{did_you_mean(top, {*map(str, tree), *self._options} - {'hydra'})}"
        parent, _, name = key.rpartition(".")
        while (node := _find(tree, parent)) is None:
            parent, _, name = parent.rpartition(".")
        siblings = [f"{parent}.{sibling}" for sibling in node] if isinstance(node, DictConfig) else []
        return f"there is no key {parent}.{name}{did_you_mean(f'{parent}.{name}', siblings)}"

    def _compose(self, overrides: Sequence[Any]) -> DictConfig:
        return _compose(self.config_name, self._words(overrides))

    def _tree(self, choices: Sequence[str]) -> DictConfig:
        """The configuration of options alone, to look at: the jobs of a sweep and the arms of a comparison share it."""
        words = self._words(choices)
        # the files of a user's own folders may change, and each resumed run has a configuration of its own
        if self._searched or self.config_name == RESUME:
            return _compose(self.config_name, words)
        return _shared(self.config_name, words)

    def _words(self, overrides: Sequence[Any]) -> tuple[str, ...]:
        words = [str(o.input_line if isinstance(o, Override) else o) for o in (*self._hydra_groups, *overrides)]
        words = [word for word in words if not word.startswith("hydra.searchpath=")]
        return (*words, f"hydra.searchpath={self._searched}") if self._searched else tuple(words)


def _compose(config_name: str, words: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, list(words), return_hydra_config=True)


@functools.lru_cache(maxsize=64)
def _shared(config_name: str, words: tuple[str, ...]) -> DictConfig:
    tree = _compose(config_name, words)
    OmegaConf.set_readonly(tree, True)
    return tree


def _values(override: Override) -> list[Any]:
    """The value of an override, or the values that a sweep lists."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [str(v) if isinstance(v, str) else v for v in value.list]
    return [] if override.is_sweep_override() else [value]


def _choice(override: Override) -> str:
    """The override of a group, with the first option of a sweep."""
    values = _values(override)
    if override.type is OverrideType.DEL or not override.is_sweep_override() or not values:
        return str(override.input_line)
    return f"{'+' if override.is_add() else ''}{override.get_key_element().lstrip('+')}={values[0]}"


def _find(tree: Any, key: str) -> Any:
    """The node at a dotted key; None where there is none."""
    for part in key.split("."):
        if isinstance(tree, ListConfig) and part.isdigit() and int(part) < len(tree):
            tree = tree._get_node(int(part))
        elif isinstance(tree, DictConfig) and not tree._is_none() and not tree._is_interpolation():
            tree = tree._get_node(part, validate_access=False)
        else:
            return None
    return tree
