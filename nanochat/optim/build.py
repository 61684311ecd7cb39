"""From a config's named groups to the run's one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from nanochat.errors import ConfigError, UserError, did_you_mean
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.options import (
    check_choice,
    check_number,
    number,
    option,
    option_fields,
    read_options,
    switch,
    whole,
)
from nanochat.optim.rule import Group, Rule
from nanochat.optim.rules import find_rule
from nanochat.optim.schedule import WEIGHT_DECAY_SCHEDULES

Named = list[tuple[str, Tensor]]
TABLES = ("embedding", "tied_embedding", "head")
"""groups that `embedding_state` speaks of"""


def _check_match(value: Any, what: str) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{what} must be a pattern such as '*norm*', or a list of them.")
    return tuple(patterns)


def _check_name(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a name.")
    return value


@dataclass(frozen=True)
class GroupSettings:
    """What a group's node holds besides the options of its rule."""

    match: tuple[str, ...] | None = option(None, _check_match)  # globs on the parameter's name
    ndim: int | None = whole(None)
    tied: bool | None = switch(None)  # only where the model is (not) tied
    optional: bool = switch(False)  # may match nothing
    rule: str | None = option(None, _check_name)
    rate: str = option("lr", _check_name)
    lr: float | None = number(None)
    weight_decay: float | None = number(None)


def build(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    groups: Mapping[str, Mapping[str, Any]],
    weight_decay: float = 0.0,
    weight_decay_schedule: str = "constant",
    embedding_state: str | None = None,
    **options: Any,
) -> Optimizer:
    """Give every trainable parameter to the first group that matches it, and build the optimizer.

    Args:
        named_parameters: (name, parameter) pairs; frozen ones are left out.
        lr: the main rate.
        groups: name -> {the fields of `GroupSettings`, options of the group's rule}.
        weight_decay: the default of every group.
        weight_decay_schedule: constant, linear (to zero), first_half (zero in the second half).
        embedding_state: `fp32` or `8bit` replaces the rule of embedding and head by its variant of that precision.
        options: `NAME_lr`, a rate that a group's `rate` names (None: `lr`); and options of rules, the default of every
            group whose rule has such an option.

    Raises:
        UserError: a parameter that no group claims, a group without parameters, an unknown or bad option.
    """
    if embedding_state is not None:
        check_choice(embedding_state, f"optim.embedding_state={embedding_state!r}", ("fp32", "8bit"))
        if not set(TABLES) & set(groups):
            raise UserError(f"optim.embedding_state is not used: there is no group {', '.join(TABLES)}.")
    settings = {name: _settings(name, node) for name, node in groups.items()}
    rules = {name: _rule(one, name, embedding_state) for name, one in settings.items()}
    known = {option for rule in rules.values() for option in option_fields(rule.Options)}
    given_rates = {"lr": lr, **{k: v for k, v in options.items() if k.endswith("_lr") and k not in known}}
    rates = {k: check_number(lr if v is None else v, f"optim.{k}={v!r}") for k, v in given_rates.items()}
    shared = {k: v for k, v in options.items() if k not in rates}
    _check_all_used(settings, rules, rates, shared)
    check_number(weight_decay, f"optim.weight_decay={weight_decay!r}")
    check_choice(
        weight_decay_schedule, f"optim.weight_decay_schedule={weight_decay_schedule!r}", list(WEIGHT_DECAY_SCHEDULES)
    )
    built: list[Group] = []
    for name, members in _claim(settings, [(name, p) for name, p in named_parameters if p.requires_grad]).items():
        one, rule = settings[name], rules[name]
        group = {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "name": name,
            "rule": rule.name,
            "lr": rates[one.rate] if one.lr is None else one.lr,
            "weight_decay": float(weight_decay) if one.weight_decay is None else one.weight_decay,
            "weight_decay_schedule": weight_decay_schedule,
            **_options(rule, groups[name], shared, f"optim.groups.{name}"),
        }
        found = {k: v for k, v in rule.auto(members[0][1].device).items() if group[k] == "auto"}
        group.update(found, auto=list(found))
        for parameter_name, parameter in members:
            rule.check(group, parameter_name, parameter)
        built.append(group)
    return Optimizer(built, {rule.name: rule for rule in rules.values()})


def _settings(name: str, node: Any) -> GroupSettings:
    where = f"optim.groups.{name}"
    if not isinstance(node, Mapping):
        raise UserError(f"{where}={node!r} is not a group such as {{match: '*', rule: adamw}}; ~{where} removes one.")
    given = {key: value for key, value in node.items() if key in option_fields(GroupSettings)}
    return GroupSettings(**read_options(GroupSettings, given, where, "a group"))


def _rule(settings: GroupSettings, name: str, embedding_state: str | None) -> Rule:
    where, rule = f"optim.groups.{name}", find_rule(settings.rule, f"optim.groups.{name}")
    if embedding_state is None or name not in TABLES:
        return rule
    return find_rule(rule.name.removesuffix("8bit") + ("8bit" if embedding_state == "8bit" else ""), where)


def _options(rule: Rule, node: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a group's rule: its own, then the shared ones, then the defaults."""
    known, common = option_fields(rule.Options), option_fields(GroupSettings)
    given = read_options(rule.Options, {k: v for k, v in shared.items() if k in known}, "optim", "")
    own = {k: v for k, v in node.items() if k not in common}
    given |= read_options(rule.Options, own, where, f"rule {rule.name}", list(common))
    options = rule.Options(**given)
    return {name: getattr(options, name) for name in known}


def _check_all_used(
    settings: Mapping[str, GroupSettings], rules: Mapping[str, Rule], rates: Mapping[str, Any], shared: Iterable[str]
) -> None:
    """Raise `ConfigError` for rates that no group names or nobody gave, and for options that no rule has."""
    problems = []
    for name, one in settings.items():
        if one.rate not in rates:
            problems.append(f"optim.groups.{name}.rate={one.rate!r} is not a rate{did_you_mean(one.rate, rates)}")
    named = {one.rate for one in settings.values()}
    problems += [
        f"optim.{rate} is not used: it is the `rate` of no group{did_you_mean(rate, named)}"
        for rate in rates
        if rate not in named and rate != "lr"
    ]
    known = {option for rule in rules.values() for option in option_fields(rule.Options)}
    also = {"lr", "groups", "weight_decay", "weight_decay_schedule", "embedding_state", *rates}
    used = ", ".join(dict.fromkeys(rule.name for rule in rules.values()))
    problems += [
        f"optim.{option} is not an option of this optimizer's rules ({used}){did_you_mean(option, known | also)}"
        for option in shared
        if option not in known
    ]
    if problems:
        raise ConfigError(problems)


def _claim(groups: Mapping[str, GroupSettings], named: Named) -> dict[str, Named]:
    """Group name -> its parameters, in the groups' order, groups without parameters left out."""
    tied = not any(name in ("head.weight", "gpt.head.weight") for name, _ in named)
    active = {name: one for name, one in groups.items() if one.tied in (None, tied)}
    claimed: dict[str, Named] = {name: [] for name in active}
    for name, parameter in named:
        owner = next((key for key, one in active.items() if _matches(one, name, parameter)), None)
        if owner is None:
            raise UserError(
                f"parameter {name} of shape {tuple(parameter.shape)} is claimed by none of the optimizer's groups "
                f"({', '.join(active)}); add a group that matches it."
            )
        claimed[owner].append((name, parameter))
    for name, members in claimed.items():
        if not members and not active[name].optional:
            raise UserError(
                f"optim.groups.{name} matches no parameter (match={active[name].match!r}, "
                f"ndim={active[name].ndim!r}); correct it, remove it, or set optional: true."
            )
    return {name: members for name, members in claimed.items() if members}


def _matches(group: GroupSettings, name: str, parameter: Tensor) -> bool:
    if group.match is not None and not any(fnmatchcase(name, pattern) for pattern in group.match):
        return False
    return group.ndim is None or parameter.ndim == group.ndim
