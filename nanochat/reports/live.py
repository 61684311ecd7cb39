"""What a sweep shows while it runs: a line for each job, read from the jobs' folders."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nanochat import run_lock
from nanochat.run_folder import as_float, read_last_row, read_summary

ORDER = ("running", "failed", "stopped", "pruned", "finished", "waiting")
"""which lines are kept where there is no room for all"""
SPARE = 6  # lines of the terminal that are not the table's


_showing: list[LiveTable] = []


def name_job(number: int, words: str) -> None:
    """Say what a job of the sweep that is shown has of its own, where its overrides come up as the sweep goes on."""
    for table in _showing:
        table.jobs[number] = words


class LiveTable:
    """A table at the foot of the terminal; what the jobs print passes above it.

    Args:
        folder: of the sweep.
        jobs: what each job has of its own, by number; of a search `name_job` says it later.
    """

    def __init__(self, folder: Path, jobs: Sequence[str], console: Console | None = None) -> None:
        self.folder, self.jobs = folder, dict(enumerate(jobs))
        self.console = console or Console(stderr=True)
        self._live = Live(
            get_renderable=self.render, console=self.console, refresh_per_second=1, transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip

    def start(self) -> None:
        """Begin to show it."""
        _showing.append(self)
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Take it away."""
        self._live.stop()
        _showing.remove(self)

    def render(self) -> Table:
        """The table as it is now."""
        states = [self._state(number) for number in range(self._count())]
        counts = Counter(state["state"] for state in states)
        title = ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
        table = Table(title=Text(f"{len(states)} jobs: {title}"), title_justify="left")
        for heading in ("job", "overrides", "state", "step", "loss", "val/bpb"):
            table.add_column(heading, no_wrap=heading != "overrides", overflow="fold")
        room = max(3, self.console.size.height - SPARE)
        kept = sorted(states, key=lambda state: (ORDER.index(state["state"]), -state["job"]))[:room]
        for state in sorted(kept, key=lambda state: state["job"]):
            table.add_row(*(Text(str(state[key])) for key in ("job", "overrides", "state", "step", "loss", "bpb")))
        return table

    def _count(self) -> int:
        found = [int(path.name) + 1 for path in self.folder.glob("*") if path.name.isdigit()]
        return max([0, *(number + 1 for number in self.jobs), *found])

    def _state(self, job: int) -> dict[str, Any]:
        folder = self.folder / str(job)
        summary, row = read_summary(folder), read_last_row(folder / "metrics.csv")
        state = "waiting" if not folder.is_dir() else str(summary.get("status", "running"))
        if state != "waiting" and run_lock.holder(folder) is not None:
            state = "running"  # the summary is that of an earlier start
        return {
            "job": job,
            "overrides": self.jobs.get(job, ""),
            "state": state if state in ORDER else "running",
            "step": row.get("step", ""),
            "loss": _short(row.get("train/loss") or summary.get("train/loss")),
            "bpb": _short(summary.get("val/bpb")),
        }


def _short(value: Any) -> str:
    number = as_float(value)
    return "" if number is None else f"{number:.4f}"
