"""The jobs of a sweep, and the table at its end."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import ConfigError, UserError
from nanochat.reports.table import Table
from nanochat.run_folder import read_summary

COLUMNS = {
    "val/loss": "val/loss",
    "val/bpb": "val/bpb",
    "train/tokens_per_second": "tokens/s",
    "optim/bytes": "optimizer bytes",
}
"""key of summary.json -> heading"""
RECORDS = ".jobs"
"""folder of the records of jobs that ran in other processes, below the sweep's"""


QUIET = "NANOCHAT_SWEEP_TABLE"
"""environment variable: a table shows the sweep, so that its jobs do not print"""


@dataclass
class Job:
    """One job of a sweep."""

    number: int
    overrides: list[str]
    folder: Path
    error: BaseException | None = None

    def row(self) -> dict[str, Any]:
        """The job's line in sweep.csv."""
        summary = {} if self.error else read_summary(self.folder)
        return {
            "job": self.number,
            "overrides": " ".join(self.overrides),
            **{key: summary.get(key, "") for key in COLUMNS},
            "status": "failed" if self.error else summary.get("status", ""),
            "step": summary.get("step", ""),
            "folder": str(self.folder) if self.folder.exists() else "",
            "error": "" if self.error is None else sentence(self.error),
        }

    def setting(self) -> list[str]:
        """The overrides but for the seed."""
        return [override for override in self.overrides if not override.startswith("seed=")]

    def record(self, sweep_folder: Path) -> None:
        """Leave a record for the process that started the sweep (`collect`)."""
        place = os.path.relpath(self.folder, sweep_folder)  # the sweep may be moved
        content: dict[str, Any] = {"job": self.number, "overrides": self.overrides, "folder": place}
        if self.error is not None:
            content |= {"error": sentence(self.error), "mistake": is_mistake(self.error)}
        (sweep_folder / RECORDS).mkdir(exist_ok=True)
        (sweep_folder / RECORDS / f"{self.number}.json").write_text(json.dumps(content), encoding="utf-8")


class JobError(Exception):
    """An error of a job that ran in another process, as the sentence that it left."""


def collect(sweep_folder: Path) -> list[Job]:
    """The jobs that left records, by number."""
    jobs = []
    for path in (sweep_folder / RECORDS).glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        error = (UserError if found["mistake"] else JobError)(found["error"]) if "error" in found else None
        jobs.append(Job(found["job"], found["overrides"], sweep_folder / found["folder"], error))
    return sorted(jobs, key=lambda job: job.number)


def forget(sweep_folder: Path) -> None:
    """Remove the records of an earlier start, where every job has its turn again."""
    for path in (sweep_folder / RECORDS).glob("*.json"):
        path.unlink(missing_ok=True)


def planned(overrides: Sequence[str]) -> list[str]:
    """What each job of a grid has of its own, by number."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    jobs = [list(job) for batch in batches for job in batch]
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(word for word in job if word not in common) for job in jobs]


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a job that is finished, or that a search has pruned; None where it has still to train."""
    summary = read_summary(folder)
    return summary if summary.get("status") in ("finished", "pruned") else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a job from printing where a table shows the sweep; train.log has it all."""
    if QUIET not in os.environ:
        yield
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def sentence(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(error.problems) if isinstance(error, ConfigError) else " ".join(str(error).split())
    return text if isinstance(error, UserError | JobError) else f"{type(error).__name__}: {text}"


def is_mistake(error: BaseException) -> bool:
    """Whether an error is the user's, and not that of a run that diverged."""
    return isinstance(error, UserError) and error.exit_code == 2


def exit_code(jobs: Sequence[Job]) -> int:
    """0 when all went well, 2 when only the user's mistakes failed, else 1."""
    errors = [job.error for job in jobs if job.error is not None]
    if not errors:
        return 0
    return 2 if all(map(is_mistake, errors)) else 1


def report(jobs: Sequence[Job], folder: Path) -> None:
    """Print the table and write it as sweep.csv into the sweep's folder, best val/bpb first.

    A sweep over seeds has one line for each setting besides. `outputs/latest` then points at the best finished job.
    """
    rows = sorted((job.row() for job in jobs), key=_rank)
    if not rows:
        return
    with open(folder / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if _rank(rows[0])[0] < math.inf:
        from nanochat.run_folder import point_latest

        point_latest(Path(rows[0]["folder"]))
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    varying = {job.number: " ".join(o for o in job.overrides if o not in common) for job in jobs}
    shared = " ".join(override for override in jobs[0].overrides if override in common)
    title = f"The sweep's {len(jobs)} jobs, best first{f' (all with {shared})' if shared else ''}"
    cells = []
    for row in rows:
        place = os.path.relpath(row["folder"]) if row["folder"] else ""
        numbers = [_cell(row[key]) for key in COLUMNS]
        if row["status"] in ("failed", "pruned"):
            numbers[0] = row["status"]
        cells.append([row["job"], varying[row["job"]], *numbers, place])
    notes = [
        f"job {row['job']} ({varying[row['job']]}) failed: {row['error']}"
        for row in sorted(rows, key=lambda row: row["job"])
        if row["error"]
    ]
    if pruned := sum(row["status"] == "pruned" for row in rows):
        notes.append(f"{pruned} pruned: ended early, with the numbers of their last validation; not ranked.")
    print(f"\n{title}")
    Table("", ["job", "overrides", *COLUMNS.values(), "folder"], cells, notes).show()
    settings = over_seeds(jobs, common)
    if settings.rows:
        settings.show()


def over_seeds(jobs: Sequence[Job], common: set[str]) -> Table:
    """A line for each setting of a sweep over seeds: means and standard deviations; no line where no seeds vary.

    common: overrides that are not repeated.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(" ".join(o for o in job.setting() if o not in common), []).append(job)
    rows = []
    for setting, members in groups.items():
        done = [found for job in members if (found := job.row())["status"] not in ("failed", "pruned")]
        if len({tuple(job.overrides) for job in members}) < 2 or not done:
            continue
        row: list[Any] = [setting or "(the same)", f"{len(done)} of {len(members)}"]
        for key in COLUMNS:
            values = [float(found[key]) for found in done if isinstance(found[key], int | float)]
            spread = f" ± {_cell(statistics.stdev(values))}" if len(values) > 1 and key.startswith("val/") else ""
            row.append(f"{_cell(statistics.mean(values))}{spread}" if values else "")
        rows.append((statistics.mean([_rank(found)[0] for found in done]), row))
    notes = ["Means over the seeds; ± is one standard deviation."]
    ordered = [row for _, row in sorted(rows, key=lambda entry: entry[0])]
    return Table("By setting", ["overrides", "seeds", *COLUMNS.values()], ordered, notes)


def _rank(row: dict[str, Any]) -> tuple[float, int]:
    """Sorts the best first; what did not come to its end has no result to rank."""
    bpb = row["val/bpb"]
    ranks = isinstance(bpb, int | float) and math.isfinite(bpb) and row["status"] not in ("failed", "pruned")
    return (bpb if ranks else math.inf), row["job"]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
