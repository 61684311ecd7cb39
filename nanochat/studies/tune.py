"""`nanochat compare --tune`: each arm gets the best value of one key before it is judged.

The runs that choose have a seed of their own, so that what is judged was not selected for being lucky.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.reports.table import Table
from nanochat.run_folder import read_summary
from nanochat.studies.evidence import TUNING
from nanochat.studies.runner import Runner, folder_name, merged
from nanochat.studies.statistics import Result

SEED = 1000  # beyond those that are judged
MOST = 20
_RANGE = re.compile(r"(log|linear)\(([^,()]+),([^,()]+),([^,()]+)\)$")


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Args:
        key: what was tuned. values: those that were tried.
        bpb: arm -> bits per byte for each value, infinite where the run diverged.
    """

    key: str
    values: list[str]
    bpb: dict[str, list[float]]

    def best(self, arm: str) -> str:
        """The value with the lowest bits per byte."""
        found = self.bpb[arm]
        return self.values[found.index(min(found))]

    def table(self, steps: int) -> Table:
        """A row for each arm, a column for each value."""
        rows = [
            [arm, *("diverged" if math.isinf(value) else f"{value:.4f}" for value in found), self.best(arm)]
            for arm, found in self.bpb.items()
        ]
        edges = {self.values[0], self.values[-1]}
        notes = [
            f"{arm} is best at the edge of the range ({self.key}={self.best(arm)}); a wider one may do better."
            for arm in self.bpb
            if len(self.values) > 2 and self.best(arm) in edges
        ]
        title = f"Tuning of {self.key}: bits per byte after {steps} steps, one run each (seed {SEED}), not judged"
        return Table(title, ["arm", *self.values, "chosen"], rows, notes)

    def figures(self) -> dict[str, Any]:
        """The same as numbers; None where a run diverged."""
        bpb = {arm: [None if math.isinf(v) else v for v in found] for arm, found in self.bpb.items()}
        return {"key": self.key, "values": self.values, "bpb": bpb, "chosen": {arm: self.best(arm) for arm in bpb}}


def parse(text: str) -> tuple[str, list[str]]:
    """The key and the values of `KEY=log(LOW,HIGH,N)`, `KEY=linear(LOW,HIGH,N)` or `KEY=A,B,C`.

    Raises:
        UserError: it is none of these.
    """
    key, _, said = text.partition("=")
    match = _RANGE.match(said.strip())
    values = [value.strip() for value in said.split(",")] if match is None else _spread(text, *match.groups())
    if not key or "(" in "".join(values) or not all(values) or not 2 <= len(set(values)) == len(values) <= MOST:
        raise UserError(
            f"--tune {text}: give KEY=log(LOW,HIGH,N), KEY=linear(LOW,HIGH,N) or KEY=A,B, 2 to {MOST} values."
        )
    return key, values


def _spread(text: str, kind: str, *numbers: str) -> list[str]:
    try:
        low, high, count = float(numbers[0]), float(numbers[1]), int(numbers[2])
    except ValueError as error:
        raise UserError(f"--tune {text}: {', '.join(numbers)} are not two numbers and a count.") from error
    if not low < high < math.inf or not 2 <= count <= MOST or (kind == "log" and low <= 0):
        raise UserError(f"--tune {text}: LOW must be below HIGH{' and above 0' * (kind == 'log')}, N from 2 to {MOST}.")
    shares = [i / (count - 1) for i in range(count)]
    values = [low * (high / low) ** share if kind == "log" else low + (high - low) * share for share in shares]
    return [f"{value:.4g}" for value in values]


def tune(
    base: Sequence[str],
    arms: Mapping[str, Sequence[str]],
    out: Path,
    steps: int,
    key: str,
    values: list[str],
    jobs: int,
) -> Tuned:
    """Train each arm once for each value.

    Raises:
        UserError: an arm diverges with every value, or a run cannot be made.
    """
    with Runner(jobs) as runner:
        planned: dict[str, list[tuple[Path, Future[Result]]]] = {arm: [] for arm in arms}
        for value in values:
            for arm, words in arms.items():
                folder = out / TUNING / folder_name(f"{arm}-{key}={value}")
                own = [*merged(merged(base, words), [f"{key}={value}"]), f"seed={SEED}"]
                planned[arm].append((folder, runner.submit(own, folder, steps)))
        bpb = {arm: [_bpb(*run) for run in trained] for arm, trained in planned.items()}
    for arm, found in bpb.items():
        if all(map(math.isinf, found)):
            raise UserError(f"{arm} diverges with every {key} of {', '.join(values)}; give lower ones.")
    return Tuned(key, values, bpb)


def _bpb(folder: Path, run: Future[Result]) -> float:
    try:
        return run.result().bpb
    except RuntimeError:
        if str(read_summary(folder).get("error", "")).startswith(("DivergedError", "NonFiniteError")):
            return math.inf
        raise
