"""A sweep of W&B's, written from the overrides of a Hydra sweep; its agents start train.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Sweep

from nanochat.config.compose import check_overrides
from nanochat.config.overrides import Overrides
from nanochat.config.schema import key_of
from nanochat.errors import UserError

METHODS = ("grid", "random", "bayes")
FOLDER = "hydra.run.dir=outputs/wandb-sweep/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"
"""by the run's id: two agents may start in the same second"""
COMMAND = ["${env}", "${interpreter}", "${program}"]
MOST = 10_000
"""values of a range"""


def sweep(
    words: Sequence[str], method: str | None = None, metric: str = "val/bpb", goal: str = "minimize",
    name: str | None = None, project: str = "nanochat", runs: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The sweep's configuration.

    Args:
        words: overrides as behind `train.py -m`: those with several values are the sweep's parameters (`a,b`,
            `choice(...)`, `range(...)`, `interval(a,b)`, `tag(log,interval(a,b))`), the others are of all runs.
        method: grid, random or bayes; None: bayes where there is an interval, else grid.
        metric: what bayes minimises, or maximises.
        runs: after which the sweep ends.

    Raises:
        UserError: nothing is swept, or the method cannot search these parameters.
        ConfigError: an override is wrong.
    """
    check_overrides(Overrides(list(words), multirun=True))
    parsed = OverridesParser.create().parse_overrides(list(words))
    swept = [override for override in parsed if override.is_sweep_override()]
    if not swept:
        raise UserError("nothing is swept: give an override with several values, such as optim=adamw,muon.")
    parameters = {str(override.get_key_element()): _parameter(override) for override in swept}
    if len(parameters) < len(swept):
        raise UserError("an override is given twice; give all of its values at once.")
    continuous = [key for key, parameter in parameters.items() if "distribution" in parameter]
    method = method or ("bayes" if continuous else "grid")
    if method == "grid" and continuous:
        raise UserError(f"method=grid cannot search the interval of {continuous[0]}; give values, or another --method.")
    fixed = [word for word, override in zip(words, parsed, strict=True) if not override.is_sweep_override()]
    keys = {key_of(word) for word in fixed}
    for word in fixed:
        if word.startswith("logger=") and "wandb" not in word:
            raise UserError(f"{word}: the runs of a W&B sweep must log to it; leave it out, or say logger=wandb.")
        if word.replace(" ", "") == "logger.wandb.offline=true":
            raise UserError(f"{word}: the runs of a W&B sweep are online.")
    added = [*([] if "logger" in keys else ["logger=wandb"]), *([] if "hydra.run.dir" in keys else [FOLDER])]
    content: dict[str, Any] = {"program": "train.py", "project": project, "method": method}
    content |= {"name": name} if name else {}
    content |= {"metric": {"name": metric, "goal": goal}, "parameters": parameters}
    content |= {"run_cap": runs} if runs else {}
    return {**content, "command": [*COMMAND, *added, *fixed, "${args_no_hyphens}"]}


def _parameter(override: Override) -> dict[str, Any]:
    """One parameter as W&B's schema has it."""
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        if value.start is None or value.end is None or value.start >= value.end:
            raise UserError(f"{override.input_line}: the interval must rise.")
        return {**_distribution(value, str(key)), "min": value.start, "max": value.end}
    if isinstance(value, RangeSweep):
        values = [number for number, _ in zip(value.range(), range(MOST + 1), strict=False)]
        if not values or len(values) > MOST:
            raise UserError(f"{override.input_line}: the range has {len(values) or 'no'} values, of at most {MOST}.")
        return {"values": values}
    if isinstance(value, ChoiceSweep):
        return {"values": [_text(item) for item in value.list]}
    assert isinstance(value, Sweep)
    raise UserError(f"{override.input_line}: a W&B sweep cannot have this; list the values.")


def _distribution(value: IntervalSweep, key: str) -> dict[str, Any]:
    if "log" in value.tags:
        if value.start is None or value.start <= 0:
            raise UserError(f"{key}: a logarithmic interval begins above 0.")
        return {"distribution": "log_uniform_values"}
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    return {"distribution": "int_uniform" if whole else "uniform"}


def _text(value: Any) -> Any:
    """A value as W&B hands it back behind `key=`: a number, or a text of Hydra's grammar."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value
    return Override._get_value_element_as_str(value)
