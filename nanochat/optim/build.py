"""From a config's named groups to the run's one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from nanochat.errors import UserError
from nanochat.optim.adam8bit import AdamW8bit
from nanochat.optim.adamw import AdamW
from nanochat.optim.apollo import Apollo
from nanochat.optim.galore import GaLore, GaLore8bit, GaLoreMuon8bit
from nanochat.optim.lion import Lion, Lion8bit
from nanochat.optim.muon import Muon, Muon8bit
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.rule import Group, Rule, check_option, check_options, number
from nanochat.optim.schedule import WEIGHT_DECAY_SCHEDULES

_ALL = (AdamW, AdamW8bit, Lion, Lion8bit, Muon, Muon8bit, GaLore, GaLore8bit, GaLoreMuon8bit, Apollo)
RULES: dict[str, Rule] = {rule.name: rule() for rule in _ALL}

GROUP_KEYS = ("match", "ndim", "tied", "optional", "rule", "rate", "lr", "weight_decay")
"""keys of a group besides its rule's options"""
TABLES = ("embedding", "tied_embedding", "head", "value_embedding")
"""groups that `embedding_state` speaks of"""


def build(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    groups: Mapping[str, Mapping[str, Any]],
    embedding_lr: float | None = None,
    tied_lr: float | None = None,
    head_lr: float | None = None,
    scalar_lr: float | None = None,
    hyper_lr: float | None = None,
    value_embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    weight_decay_schedule: str = "constant",
    embedding_state: str | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    momentum_start: float | None = None,
    momentum_warmup: int | None = None,
    nesterov: bool | None = None,
    ema: bool | None = None,
    ns_steps: int | None = None,
    newton_schulz: str | None = None,
    adjust: str | None = None,
    row_equilibration: bool | None = None,
    normuon_beta: float | None = None,
    cautious_weight_decay: bool | None = None,
    block_size: int | None = None,
    stochastic_rounding: bool | None = None,
    kernels: str | None = None,
    rank: int | float | str | None = None,
    update_period: int | None = None,
    power_iterations: int | None = None,
    oversampling: int | None = None,
    scale: float | None = None,
    norm_growth_limit: float | None = None,
) -> Optimizer:
    """Give every trainable parameter to the first group that matches it, and build the optimizer.

    Args:
        named_parameters: (name, parameter) pairs; frozen ones are left out.
        lr: the main rate. The other `*_lr` are named by a group's `rate`; where one is None, `lr` stands in.
        groups: name -> {match: glob or globs on the name, ndim, tied: only where the model is (not) tied,
            optional: may match nothing, rule, rate: name of a rate (default `lr`), lr, weight_decay, options}.
        weight_decay, and all further arguments: the default of every group whose rule has such an option.
        weight_decay_schedule: constant, linear (to zero), first_half (zero in the second half).
        embedding_state: `fp32` or `8bit` replaces the rule of embedding and head by its variant of that precision.

    Raises:
        UserError: a parameter that no group claims, a group without parameters, an unknown or bad option.
    """
    rates = {
        "lr": lr,
        "embedding_lr": embedding_lr,
        "tied_lr": tied_lr,
        "head_lr": head_lr,
        "scalar_lr": scalar_lr,
        "hyper_lr": hyper_lr,
        "value_embedding_lr": value_embedding_lr,
    }
    rates = {k: number(lr if v is None else v, f"optim.{k}={v!r}") for k, v in rates.items()}
    shared = {
        "betas": betas,
        "eps": eps,
        "momentum": momentum,
        "momentum_start": momentum_start,
        "momentum_warmup": momentum_warmup,
        "nesterov": nesterov,
        "ema": ema,
        "ns_steps": ns_steps,
        "newton_schulz": newton_schulz,
        "adjust": adjust,
        "row_equilibration": row_equilibration,
        "normuon_beta": normuon_beta,
        "cautious_weight_decay": cautious_weight_decay,
        "block_size": block_size,
        "stochastic_rounding": stochastic_rounding,
        "kernels": kernels,
        "rank": rank,
        "update_period": update_period,
        "power_iterations": power_iterations,
        "oversampling": oversampling,
        "scale": scale,
        "norm_growth_limit": norm_growth_limit,
    }
    shared = {k: check_option(k, v, f"optim.{k}={v!r}") for k, v in shared.items() if v is not None}
    number(weight_decay, f"optim.weight_decay={weight_decay!r}")
    if weight_decay_schedule not in WEIGHT_DECAY_SCHEDULES:
        raise UserError(
            f"optim.weight_decay_schedule={weight_decay_schedule!r} is unknown; "
            f"choose one of {', '.join(WEIGHT_DECAY_SCHEDULES)}."
        )
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    claimed = _claim(groups, named)
    built: list[Group] = []
    for name, members in claimed.items():
        node = dict(groups[name])
        where = f"optim.groups.{name}"
        rule = _rule(node, name, where, embedding_state)
        options = {k: v for k, v in shared.items() if k in rule.options}
        options.update({k: v for k, v in node.items() if k not in GROUP_KEYS})
        rate = node.get("rate") or "lr"
        if rate not in rates:
            raise UserError(f"{where}.rate={rate!r} is unknown; choose one of {', '.join(rates)}.")
        group = {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "name": name,
            "rule": rule.name,
            "lr": rates[rate] if node.get("lr") is None else number(node["lr"], f"{where}.lr={node['lr']!r}"),
            "weight_decay": _weight_decay(node, weight_decay, where),
            "weight_decay_schedule": weight_decay_schedule,
            **check_options(rule, options, where),
        }
        for parameter_name, parameter in members:
            rule.check(group, parameter_name, parameter)
        built.append(group)
    used = {option for node in groups.values() for option in _rule(node, "", "", None).options}
    for option in shared:
        if option not in used:
            raise UserError(f"optim.{option}={shared[option]!r}: no rule of this optimizer has such an option.")
    return Optimizer(built, RULES)


def _weight_decay(node: Mapping[str, Any], default: float, where: str) -> float:
    value = node.get("weight_decay")
    return float(default) if value is None else number(value, f"{where}.weight_decay={value!r}")


def _rule(node: Mapping[str, Any], name: str, where: str, embedding_state: str | None) -> Rule:
    rule = node.get("rule")
    if embedding_state is not None and embedding_state not in ("fp32", "8bit"):
        raise UserError(f"optim.embedding_state={embedding_state!r} is unknown; choose fp32 or 8bit.")
    if embedding_state is not None and name in TABLES:
        rule = str(rule).removesuffix("8bit") + ("8bit" if embedding_state == "8bit" else "")
    if rule not in RULES:
        raise UserError(f"{where}.rule={rule!r} is unknown; choose one of {', '.join(RULES)}.")
    return RULES[rule]


def _claim(
    groups: Mapping[str, Mapping[str, Any]], named: list[tuple[str, Tensor]]
) -> dict[str, list[tuple[str, Tensor]]]:
    """Group name -> its parameters, in the groups' order, groups without parameters left out."""
    for name, node in groups.items():
        _check_group(name, node)
    tied = not any(name in ("head.weight", "gpt.head.weight") for name, _ in named)
    active = {name: node for name, node in groups.items() if node.get("tied") in (None, tied)}
    claimed: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in active}
    for name, parameter in named:
        owner = next((key for key, node in active.items() if _matches(node, name, parameter)), None)
        if owner is None:
            raise UserError(
                f"parameter {name} of shape {tuple(parameter.shape)} is claimed by none of the optimizer's groups "
                f"({', '.join(active)}); add a group that matches it."
            )
        claimed[owner].append((name, parameter))
    for name, members in claimed.items():
        if not members and not active[name].get("optional"):
            raise UserError(
                f"optim.groups.{name} matches no parameter (match={active[name].get('match')!r}, "
                f"ndim={active[name].get('ndim')!r}); correct it, remove it, or set optional: true."
            )
    return {name: members for name, members in claimed.items() if members}


def _check_group(name: str, node: Any) -> None:
    """Raise `UserError` for a group that is none, or whose conditions no parameter can meet."""
    where = f"optim.groups.{name}"
    if not isinstance(node, Mapping):
        raise UserError(f"{where}={node!r} is no group such as {{match: '*', rule: adamw}}; ~{where} removes one.")
    for key in ("tied", "optional"):
        if node.get(key) is not None and not isinstance(node[key], bool):
            raise UserError(f"{where}.{key}={node[key]!r} must be true, false or null.")
    dimensions = node.get("ndim")
    if dimensions is not None and (not isinstance(dimensions, int) or isinstance(dimensions, bool)):
        raise UserError(f"{where}.ndim={dimensions!r} must be a whole number or null.")


def _matches(node: Mapping[str, Any], name: str, parameter: Tensor) -> bool:
    patterns = node.get("match")
    if isinstance(patterns, str):
        patterns = [patterns]
    if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
        return False
    return node.get("ndim") is None or parameter.ndim == node["ndim"]
