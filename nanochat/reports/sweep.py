"""The jobs of a sweep, and the table at its end."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import ConfigError, UserError
from nanochat.run_folder import read_summary

COLUMNS = {
    "val/loss": "val/loss",
    "val/bpb": "val/bpb",
    "train/tokens_per_second": "tokens/s",
    "optim/bytes": "optimizer bytes",
}
"""key of summary.json -> heading"""


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
            "folder": str(self.folder) if self.folder.exists() else "",
            "error": "" if self.error is None else sentence(self.error),
        }


def sentence(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(error.problems) if isinstance(error, ConfigError) else " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def exit_code(jobs: Sequence[Job]) -> int:
    """0 when all went well, 2 when only the user's mistakes failed, else 1."""
    errors = [job.error for job in jobs if job.error is not None]
    if not errors:
        return 0
    return 2 if all(isinstance(error, UserError) and error.exit_code == 2 for error in errors) else 1


def report(jobs: Sequence[Job], folder: Path) -> None:
    """Print the table and write it as sweep.csv into the sweep's folder, best val/bpb first.

    `outputs/latest` then points at the best job.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = sorted((job.row() for job in jobs), key=_rank)
    if not rows:
        return
    with open(folder / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if not rows[0]["error"] and rows[0]["val/bpb"] != "":
        from nanochat.run_folder import point_latest

        point_latest(Path(rows[0]["folder"]))
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    told = {job.number: " ".join(o for o in job.overrides if o not in common) for job in jobs}
    table = Table()
    for heading in ("job", "overrides", *COLUMNS.values(), "folder"):
        table.add_column(heading, justify="right" if heading in COLUMNS.values() else "left", overflow="fold")
    for row in rows:
        place = os.path.relpath(row["folder"]) if row["folder"] else ""
        numbers = ["failed" if row["error"] and not i else _cell(row[key]) for i, key in enumerate(COLUMNS)]
        table.add_row(*map(Text, (str(row["job"]), told[row["job"]], *numbers, place)))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    shared = " ".join(override for override in jobs[0].overrides if override in common)
    console.print(
        f"\nThe sweep's {len(jobs)} jobs, best first{f' (all with {shared})' if shared else ''}", soft_wrap=True
    )
    console.print(table)
    for row in sorted(rows, key=lambda row: row["job"]):
        if row["error"]:
            console.print(f"job {row['job']} ({told[row['job']]}) failed: {row['error']}", soft_wrap=True)


def _rank(row: dict[str, Any]) -> tuple[float, int]:
    bpb = row["val/bpb"]
    return (bpb if isinstance(bpb, int | float) and bpb == bpb else float("inf")), row["job"]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
