"""What the paired differences of matched runs show: Student's t intervals and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.reports.table import Table

# two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip
MOST_SEEDS = len(STUDENT) + 1


@dataclass
class Result:
    """What a finished run says of itself."""

    folder: Path
    bpb: float  # bits per byte of validation text
    step_seconds: float
    state_bytes: int  # of the optimizer


@dataclass
class Comparison:
    """The runs of each arm by seed, `plain` first."""

    steps: int
    equal: dict[str, list[Result]]
    timed: dict[str, list[Result]] = field(default_factory=dict)
    """runs of as many steps as fit into the plain run's time, by arm"""
    timed_steps: dict[str, int] = field(default_factory=dict)

    @property
    def plain(self) -> list[Result]:
        """The runs that the others are compared with."""
        return next(iter(self.equal.values()))

    def step_ratio(self, arm: str) -> float:
        """Seconds of the arm's step over those of the plain one's: the median over the pairs."""
        return statistics.median(
            a.step_seconds / b.step_seconds for a, b in zip(self.equal[arm], self.plain, strict=True)
        )

    def tables(self) -> Iterator[Table]:
        """The table at equal steps, then the one at equal time if runs were made for that."""
        last = ["bits per byte", "difference", "verdict"]
        rows = []
        for arm, results in self.equal.items():
            first = [arm, f"{self.step_ratio(arm):.3f}", f"{results[0].state_bytes / 1e6:,.2f}"]
            rows.append([*first, *self._against_plain(results)])
        yield Table(f"{self.steps} steps", ["arm", "step / plain", "optimizer MB", *last], rows)
        if self.timed:
            runs = {next(iter(self.equal)): (self.steps, self.plain)}
            runs |= {arm: (self.timed_steps[arm], results) for arm, results in self.timed.items()}
            rows = [[arm, str(steps), *self._against_plain(results)] for arm, (steps, results) in runs.items()]
            yield Table("the same time", ["arm", "steps", *last], rows)

    def _against_plain(self, results: list[Result]) -> list[str]:
        mean = f"{statistics.mean(r.bpb for r in results):.4f}"
        return (
            [mean, "", ""]
            if results is self.plain
            else [mean, difference(results, self.plain), verdict(results, self.plain)]
        )

    def markdown(self) -> str:
        """The tables for a document."""
        return "\n\n".join(table.markdown() for table in self.tables())

    def figures(self) -> dict[str, Any]:
        """The same as numbers, run by run."""
        arms: dict[str, Any] = {}
        for arm, results in self.equal.items():
            arms[arm] = {
                "bpb": [r.bpb for r in results],
                "step_ratio": self.step_ratio(arm),
                "optimizer_bytes": results[0].state_bytes,
            }
            if arm in self.timed:
                arms[arm] |= {"timed_steps": self.timed_steps[arm], "timed_bpb": [r.bpb for r in self.timed[arm]]}
        return {"steps": self.steps, "arms": arms}


def interval(results: Sequence[Result], plain: Sequence[Result]) -> tuple[float, float]:
    """Mean of the paired differences in bits per byte, and half the width of its 95% interval (Student's t).

    The half is infinite for a single pair.
    """
    return mean_interval([a.bpb - b.bpb for a, b in zip(results, plain, strict=True)])


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values, and half the width of its 95% interval (Student's t; infinite for one value)."""
    if len(values) < 2:
        return values[0], float("inf")
    quantile = STUDENT[min(len(values), MOST_SEEDS) - 2]  # beyond the table a little too wide
    return statistics.mean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def difference(results: Sequence[Result], plain: Sequence[Result]) -> str:
    """The interval in words; less is better."""
    return in_words(*interval(results, plain))


def in_words(mean: float, half: float) -> str:
    """A difference with its interval, where there is one."""
    return f"{mean:+.4f}" if half == float("inf") else f"{mean:+.4f} ± {half:.4f}"


def verdict(results: Sequence[Result], plain: Sequence[Result]) -> str:
    """What the interval shows."""
    return judge(*interval(results, plain))


def judge(mean: float, half: float) -> str:
    """What a difference shows of which less is better."""
    if half == float("inf"):
        return "one seed: no verdict"
    return "no difference shown" if abs(mean) <= half else "better" if mean < 0 else "worse"
