"""What lies in a run's folder: its checkpoints, its summary, its metrics, and the link to the latest run."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from nanochat.errors import UserError

LAST_BYTES = 1 << 14  # of a metrics.csv, in which its last row lies
STEP_FILE = re.compile(r"step=(\d+)\.ckpt")
HEARTBEAT = "heartbeat.json"
"""where a run says that it lives, see `nanochat.training.callbacks.heartbeat`"""


def find_checkpoint(path: str | Path, which: str | int = "last") -> tuple[Path, Path]:
    """The run folder and the checkpoint file that `path` means.

    Args:
        path: a run folder, a link to one (`outputs/latest`), or a `.ckpt` file in a run's `checkpoints` folder.
        which: "last", or the optimizer step of a kept checkpoint ("200", 200 or "step=200").

    Raises:
        UserError: nothing there, not a run folder, no such checkpoint (the message lists those that exist), or a step
            beside a file.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise UserError(f"{path} is not a run: give a run folder (such as outputs/latest) or a .ckpt file.")
        check_no_step(path, which)
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return folder, path
    if not path.is_dir():
        dangling = " (a link to a folder that is gone)" if path.is_symlink() else ""
        raise UserError(f"there is no run at {path}{dangling}; train one, or name another run folder.")
    folder = path.parent if path.name == "checkpoints" else path
    step = str(which).removeprefix("step=").removesuffix(".ckpt")
    name = "last" if step == "last" else f"step={step}"
    checkpoint = folder / "checkpoints" / f"{name}.ckpt"
    if checkpoint.is_file():
        return folder, checkpoint
    kept = sorted(found.stem for found in (folder / "checkpoints").glob("*.ckpt"))
    if kept:
        raise UserError(f"{folder} has no checkpoint {name!r}; it has {', '.join(kept)}.")
    if not (folder / "model.json").is_file() and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has neither model.json nor checkpoints.")
    raise UserError(f"{folder} has no checkpoint yet: the run was stopped before its first save.")


def check_no_step(path: Path, which: str | int) -> None:
    """Raises `UserError` where `path` is one file, so that there is no step of a run to choose."""
    if str(which) != "last":
        raise UserError(f"--checkpoint {which} names a step of a run folder, and {path} is a file.")


def read_chat_template(folder: Path) -> str | None:
    """The Jinja text in a run's chat_template.jinja, None without one; raises `UserError` when it cannot be read."""
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}.") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json; `{}` when there is none, or none that can be read."""
    return read_mapping(folder / "summary.json")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping of a JSON file; `{}` when there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def as_float(value: Any) -> float | None:
    """What a run wrote as a number, finite or not; None of anything else, such as a cell that is empty or damaged."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def as_number(value: Any) -> float | None:
    """A finite number, None of anything else."""
    found = as_float(value)
    return found if found is not None and math.isfinite(found) else None


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv, as text; `[]` without a file. Raises `UserError` when it cannot be read."""
    try:
        return whole_rows(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a table of text"
        raise UserError(f"{path} cannot be read: {reason}; move it elsewhere.") from error


def whole_rows(text: str) -> list[dict[str, str]]:
    """The rows of a metrics.csv's text that have all columns and a step; a last line that was cut off is left out.

    Raises:
        csv.Error: a field is longer than any that a run writes.
    """
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdecimal()]


def last_rows(path: Path, size: int) -> tuple[list[dict[str, str]], bool]:
    """The whole rows in the last `size` bytes of a metrics.csv, and whether these are all rows of the file.

    Raises:
        OSError, csv.Error: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.readline(size)
        start = max(len(head), os.fstat(file.fileno()).st_size - size)
        file.seek(start)
        if start > len(head):
            file.readline()  # the rest of a row
        return whole_rows((head + file.read()).decode(errors="replace")), start == len(head)


def read_last_row(path: Path) -> dict[str, str]:
    """The last whole row of a metrics.csv, without reading all of it; `{}` where there is none."""
    try:
        rows, _ = last_rows(path, LAST_BYTES)
    except (OSError, csv.Error):
        return {}
    return rows[-1] if rows else {}


def step_checkpoints(folder: Path) -> dict[int, Path]:
    """The `step=N.ckpt` files of a run's `checkpoints` folder by N, the newest first."""
    names = {path: STEP_FILE.fullmatch(path.name) for path in folder.glob("step=*.ckpt")}
    found = {int(match[1]): path for path, match in names.items() if match}
    return dict(sorted(found.items(), reverse=True))


def point_latest(folder: Path) -> None:
    """Make `outputs/latest` a relative link to a run folder below a folder called outputs; elsewhere nothing."""
    folder = folder.absolute()
    outputs = next((parent for parent in folder.parents if parent.name == "outputs"), None)
    link = None if outputs is None else outputs / "latest"
    if link is None or (link.exists() and not link.is_symlink()):
        return
    aside = link.with_name(f".latest.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)
    os.replace(aside, link)
