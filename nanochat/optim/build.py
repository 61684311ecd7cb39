"""From a config's named groups to the run's one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

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
TABLES = ("embedding", "tied_embedding", "head", "value_embedding")
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
    plans, rates = _plan(groups, embedding_state, {"lr": lr, **options})
    check_number(weight_decay, f"optim.weight_decay={weight_decay!r}")
    check_choice(
        weight_decay_schedule, f"optim.weight_decay_schedule={weight_decay_schedule!r}", list(WEIGHT_DECAY_SCHEDULES)
    )
    built: list[Group] = []
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    for name, members in _claim({name: plan.settings for name, plan in plans.items()}, named).items():
        settings, rule, own = plans[name].settings, plans[name].rule, plans[name].options
        auto = {k: v for k, v in rule.auto(members[0][1].device).items() if own[k] == "auto"}
        group = {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "name": name,
            "rule": rule.name,
            "lr": rates[settings.rate] if settings.lr is None else settings.lr,
            "weight_decay": float(weight_decay) if settings.weight_decay is None else settings.weight_decay,
            "weight_decay_schedule": weight_decay_schedule,
            "auto": list(auto),
            **own,
            **auto,
        }
        for parameter_name, parameter in members:
            rule.check(group, parameter_name, parameter)
        built.append(group)
    return Optimizer(built, {plan.rule.name: plan.rule for plan in plans.values()})


def problems_of(node: Mapping[str, Any]) -> list[str]:
    """What `build` refuses of a config's node, whatever the parameters are: one sentence each.

    The check of configurations asks for it, since a signature with `**options` cannot say.
    """
    options = {k: v for k, v in node.items() if not k.startswith("_") and k not in KEYWORDS}
    try:
        _plan(node["groups"], node.get("embedding_state"), {"lr": 0.0, **options})
    except ConfigError as error:
        return error.problems
    return []


build.__dict__["problems_of"] = problems_of
KEYWORDS = ("lr", "groups", "weight_decay", "weight_decay_schedule", "embedding_state")
"""arguments of `build` that are neither rates nor options of rules"""


class GroupPlan(NamedTuple):
    """A group before it has parameters: what it holds, its rule, and all options of the rule."""

    settings: GroupSettings
    rule: Rule
    options: dict[str, Any]


def _plan(
    groups: Mapping[str, Any], embedding_state: str | None, given: Mapping[str, Any]
) -> tuple[dict[str, GroupPlan], dict[str, float]]:
    """The plans by group, and the rates among the given options; raises `ConfigError` with every problem."""
    plans, rates, problems = {}, {}, []
    for name, node in groups.items():
        try:
            plans[name] = _plan_group(name, node, embedding_state, given)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if embedding_state is not None and not set(TABLES) & set(groups):
        problems.append(f"optim.embedding_state is not used: none of the groups is {', '.join(TABLES)}.")
    known = {option for plan in plans.values() for option in option_fields(plan.rule.Options)}
    named = {plan.settings.rate: name for name, plan in plans.items()}
    for key, value in given.items():
        if key in known:
            continue
        if key != "lr" and not key.endswith("_lr"):
            rules = ", ".join(dict.fromkeys(plan.rule.name for plan in plans.values()))
            near = did_you_mean(key, {*known, *KEYWORDS, *named})
            problems.append(f"optim.{key} is not an option of this optimizer's rules ({rules}){near}")
        elif key != "lr" and key not in named:
            problems.append(f"optim.{key} is not used: it is the `rate` of no group{did_you_mean(key, named)}")
        else:
            try:
                rates[key] = check_number(given["lr"] if value is None else value, f"optim.{key}={value!r}")
            except UserError as error:
                problems.append(str(error))
    for rate, name in named.items():
        if rate not in given:
            problems.append(f"optim.groups.{name}.rate={rate!r} is not a rate{did_you_mean(rate, rates)}")
    if problems:
        raise ConfigError(problems)
    return plans, rates


def _plan_group(name: str, node: Any, embedding_state: str | None, shared: Mapping[str, Any]) -> GroupPlan:
    where, common = f"optim.groups.{name}", option_fields(GroupSettings)
    if not isinstance(node, Mapping):
        raise UserError(f"{where}={node!r} is not a group such as {{match: '*', rule: adamw}}; ~{where} removes one.")
    settings = GroupSettings(**read_options(GroupSettings, {k: v for k, v in node.items() if k in common}, where, ""))
    rule = find_rule(settings.rule, where)
    if embedding_state is not None and name in TABLES:
        check_choice(embedding_state, f"optim.embedding_state={embedding_state!r}", ("fp32", "8bit"))
        rule = find_rule(rule.name.removesuffix("8bit") + ("8bit" if embedding_state == "8bit" else ""), where)
    known = option_fields(rule.Options)
    options = read_options(rule.Options, {k: v for k, v in shared.items() if k in known}, "optim", "")
    own = {k: v for k, v in node.items() if k not in common}
    options |= read_options(rule.Options, own, where, f"rule {rule.name}", list(common))
    complete = rule.Options(**options)
    return GroupPlan(settings, rule, {name: getattr(complete, name) for name in known})


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
