"""What is given on the command line takes part in the run: values of parts that the network lacks are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nanochat.config.schema import Problem, features, keys_of_user, set_by_user, swept_keys
from nanochat.config.signatures import show

if TYPE_CHECKING:
    from nanochat.config.rules import Values

NEEDS: tuple[tuple[str, Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (
        "model.value_embeddings",
        lambda tables: tables != 0,
        "1 or 2",
        (
            "model.value_embedding_layers",
            "model.value_embedding_width",
            "model.value_embedding_std",
            "model.value_gate",
            "model.value_gain",
        ),
    ),
    ("model.value_gate", lambda gate: gate != "input", "static", ("model.value_gain",)),
    ("model.streams", lambda streams: streams != 1, "2 or 4", ("model.stream_maps",)),
    ("model.tied", lambda tied: tied is not True, "false", ("model.head_std",)),
    ("model.qk_norm", lambda norm: norm is not False, "true", ("model.qk_gain",)),
)
"""(key, whether its value is one with which some other keys take part, such values, those other keys)"""


def model_keys_take_part(values: Values) -> Iterator[Problem]:
    """What the user says of a part of the network is said of a part that the network has."""
    said: set[str] = set()
    for key, takes_part, such, others in NEEDS:
        value = values.get(key)
        if value is None or values.bad(key) or takes_part(value):
            continue
        for other in others:
            if other not in said and set_by_user(other) and not _decided_in_sweep():
                said.add(other)
                text = f"{other} takes no part in the run while {key}={show(value)}; it needs {key}={such}."
                yield Problem(other, text)


def _decided_in_sweep() -> bool:
    """Whether the jobs of this sweep have different parts, so that a value may be meant for some of them alone."""
    parts = {key.partition(".")[0] for key in swept_keys()}
    return not parts.isdisjoint({"model", "optim", "experiment", *features()})


def idle_rates(optim: dict[str, Any], used: set[str]) -> Iterator[Problem]:
    """What the user says of groups, or of their rates, that have no parameters in this network."""
    nodes = optim.get("groups")
    if not isinstance(nodes, dict) or _decided_in_sweep():
        return
    rates: dict[str, bool] = {}
    for name, node in nodes.items():
        rate = str(node.get("rate", "lr"))
        rates[rate] = rates.get(rate, False) or name in used
        for key in keys_of_user():
            if f"{key}.".startswith(f"optim.groups.{name}.") and name not in used:
                yield Problem(key, f"{key} takes no part in the run: the group {name} has no parameters.")
    for rate, takes_part in rates.items():
        if not takes_part and rate != "lr" and set_by_user(f"optim.{rate}"):
            text = f"optim.{rate} takes no part in the run: no parameter of this network has that rate."
            yield Problem(f"optim.{rate}", text)
