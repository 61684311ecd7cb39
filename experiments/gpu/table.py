"""One dated Markdown page out of the figures that run.sh left: `python experiments/gpu/table.py FOLDER`."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MATRIX = "matrix"
HEADINGS = ("preset", "mode", "arithmetic", "optimizer", "tokens a step", "tokens/s", "ms a step", "MFU", "peak GB")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, number or word) of everything in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{i}")
    else:
        yield path, value


def matrix_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of the matrix; the last column compares with the float step of the same preset and mode."""
    float_steps = {
        (row["preset"], row["compiled"]): row["step_seconds"]
        for row in rows
        if row["arithmetic"] == "float" and "error" not in row
    }
    yield f"| {' | '.join(HEADINGS)} | step of float's |"
    yield "|---|---|---|---|" + "---:|" * 6
    for row in rows:
        mode = "compiled" if row["compiled"] else "eager"
        start = f"| {row['preset']} | {mode} | {row['arithmetic']} | {row['optimizer']} |"
        if "error" in row:
            yield f"{start} FAILED: {row['error'].replace('|', '/')} | | | | | |"
            continue
        base = float_steps.get((row["preset"], row["compiled"]))
        cells = [
            f"{row['tokens_per_step']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{1000 * row['step_seconds']:.1f}",
            "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%",
            "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}",
            "" if base is None else f"{row['step_seconds'] / base:.2f}x",
        ]
        yield f"{start} {' | '.join(cells)} |"


def main(folder: Path) -> int:
    """Print the page; 1 when a check left no figures or a cell of the matrix failed."""
    print(f"\n{datetime.date.today()}", end="")
    failed, figures = [], {}
    for file in sorted(folder.glob("*.json")):
        try:
            figures[file.stem] = json.loads(file.read_text())
        except ValueError:
            failed.append(file.stem)
    rows = figures.pop(MATRIX, [])
    if done := [row for row in rows if "error" not in row]:
        print(f", {done[0]['device']}, torch {done[0]['torch']}, {done[0]['precision']}", end="")
    print("\n")
    if rows:
        print("\n".join(matrix_lines(rows)), end="\n\n")
    if figures or failed:
        print("| check | figure | value |\n|---|---|---:|")
    for name, value in figures.items():
        for path, leaf in leaves(value):
            print(f"| {name} | {path} | {f'{leaf:.4g}' if isinstance(leaf, float) else leaf} |")
    for name in failed:
        print(f"| {name} | FAILED: no figures | |")
    return 1 if failed or len(done) < len(rows) else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
