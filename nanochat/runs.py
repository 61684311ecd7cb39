"""`nanochat runs`: every run below a folder, and how it is doing."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nanochat import run_lock
from nanochat.console import Parser, clock_time, disk_size, seconds
from nanochat.errors import UserError
from nanochat.files import shown
from nanochat.reports.table import Table
from nanochat.run_folder import HEARTBEAT, as_number, last_rows, read_mapping, read_summary, whole_rows

TAIL = 1 << 18
"""bytes at the end of a metrics.csv that are read for its latest numbers"""
RECENT = 20
"""steps of which loss and speed are shown"""
LEFT_OUT = {"checkpoints", "wandb", "mlruns", "tensorboard", ".hydra"}
"""folders that hold no runs"""
SILENT = 600.0
"""seconds without a heartbeat after which a run is said to be silent: a step that long is rare, a process that hangs is
not"""


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders below a folder (itself included), in the order of their names; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        if "config.yaml" in files and ("model.json" in files or "checkpoints" in os.listdir(place)):
            yield Path(place)


def describe(folder: Path) -> dict[str, Any]:
    """A run's `state` and numbers; a number that is not known is None.

    The state is `running` (a process holds the folder), `silent` (so, but without a heartbeat for long), `finished`,
    `stopped` (by a signal or Ctrl-C), `failed`, `killed` (it has ended without a word), or `unreadable` (its files are
    damaged, and none of them says how it ended). Text where a number belongs counts as not known.
    """
    beat, summary = _heartbeat(folder), read_summary(folder)
    rows = _latest_rows(folder / "metrics.csv")
    losses = _numbers(rows, "train/loss")[-RECENT:]
    speeds = _numbers(rows, "train/tokens_per_second")[-RECENT:]
    state = _state(folder, beat, summary)
    if state == "killed" and not (beat or summary or rows) and _has_content(folder, "summary.json", "metrics.csv"):
        state = "unreadable"
    left = as_number(beat.get("seconds_left")) if state == "running" else None
    # a heartbeat is seconds old, and the rows may be of every tenth step
    steps = [_whole(beat.get("step")), int(rows[-1]["step"]) if rows and beat else None]
    step = max((one for one in steps if one is not None), default=_whole(summary.get("step")))
    if step is None:
        step = int(rows[-1]["step"]) if rows else 0
    bpbs = _numbers(rows, "val/bpb")
    return {
        "run": shown(folder),
        "state": state,
        "step": step,
        "max_steps": _whole(beat.get("max_steps")) or _planned_steps(folder),
        "loss": sum(losses) / len(losses) if losses else None,
        "val/bpb": bpbs[-1] if bpbs else as_number(summary.get("val/bpb")),
        "tokens_per_second": len(speeds) / sum(1.0 / max(speed, 1e-9) for speed in speeds) if speeds else None,
        "seconds_left": max(0.0, left - max(0.0, time.time() - beat["time"])) if left is not None else None,
        "bytes": disk_bytes(folder),
    }


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's files; one with several names counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                found = os.lstat(os.path.join(place, name))
            except OSError:  # removed meanwhile
                continue
            sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def _state(folder: Path, beat: dict[str, Any], summary: dict[str, Any]) -> str:
    if run_lock.holder(folder) is not None:
        return "silent" if beat and time.time() - beat["time"] > SILENT else "running"
    status = summary.get("status")
    if not status or (beat and beat["time"] > (folder / "summary.json").stat().st_mtime):
        return "killed"  # the summary, if any, is of an earlier session
    return str(status)


def _heartbeat(folder: Path) -> dict[str, Any]:
    found = read_mapping(folder / HEARTBEAT)
    beat = as_number(found.get("time"))
    return {} if beat is None else {**found, "time": beat}


def _planned_steps(folder: Path) -> int | None:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        steps = config["trainer"]["max_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    return steps if isinstance(steps, int) and steps > 0 else None


def _latest_rows(path: Path) -> list[dict[str, str]]:
    """The last rows of a metrics.csv; all of them where the last ones have no validation."""
    try:
        rows, whole = last_rows(path, TAIL)
        if whole or _numbers(rows, "val/bpb"):
            return rows
        return whole_rows(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, csv.Error):
        return []


def _has_content(folder: Path, *names: str) -> bool:
    """Whether one of a run's files has more than a line of headings."""
    for name in names:
        with contextlib.suppress(OSError):
            content = (folder / name).read_bytes()
            if content and not (content.startswith(b"step,") and content.count(b"\n") <= 1):
                return True
    return False


def _numbers(rows: list[dict[str, str]], name: str) -> list[float]:
    """The numbers of a column; a row without one is left out."""
    found = (as_number(row.get(name)) for row in rows)
    return [number for number in found if number is not None]


def _whole(value: Any) -> int | None:
    found = as_number(value)
    return None if found is None else int(found)


def table(runs: list[dict[str, Any]], title: str) -> Table:
    """Runs as a table."""
    rows = []
    for run in runs:
        loss, bpb, speed, left = (run[key] for key in ("loss", "val/bpb", "tokens_per_second", "seconds_left"))
        end = "" if run["max_steps"] is None else f" of {run['max_steps']:,}"
        rows.append([
            run["run"], run["state"], f"{run['step']:,}{end}",
            "" if loss is None else f"{loss:.4f}", "" if bpb is None else f"{bpb:.4f}",
            "" if speed is None else f"{speed:,.0f}", "" if left is None else clock_time(left), disk_size(run["bytes"]),
        ])  # fmt: skip
    headings = ["run", "state", "step", "loss", "val/bpb", "tokens/s", "left", "disk"]
    total = sum(run["bytes"] for run in runs)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return Table(title, headings, rows, [f"{count}, {disk_size(total)} on disk." if runs else "No runs yet."])


def main(argv: list[str]) -> int:
    """Show the runs; returns the exit code."""
    parser = Parser("runs", "All runs below a folder: state, progress, speed, time left and disk space.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="where to look (outputs)")
    parser.add_argument("--watch", action="store_true", help="show it anew until Ctrl-C")
    parser.add_argument("--every", type=seconds, default=5.0, help="seconds between two looks of --watch (5)")
    options = parser.parse_args(argv)
    if options.watch and options.json:
        raise UserError("nanochat runs: --json is one answer; it does not go with --watch.")
    if not options.folder.is_dir():
        raise UserError(f"nanochat runs: there is no folder {options.folder}; name the one that your runs are in.")
    try:
        while True:
            runs = [describe(folder) for folder in find_runs(options.folder)]
            if options.json:
                print(json.dumps(runs, indent=1))
            else:
                if options.watch:
                    print("\033[2J\033[H" if os.isatty(1) else "", end="")
                table(runs, f"Runs in {options.folder}").show()
            if not options.watch:
                return 0
            time.sleep(options.every)
    except KeyboardInterrupt:
        return 0
