"""One Markdown table out of the figures that run.sh left: `python experiments/gpu/table.py FOLDER`."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def main(folder: Path) -> int:
    """Print the table; 1 when a check left no figures."""
    print(f"\n{datetime.date.today()}\n\n| check | figure | value |\n|---|---|---|")
    missing = []
    for file in sorted(folder.glob("*.json")):
        try:
            figures = json.loads(file.read_text())
        except ValueError:
            missing.append(file.stem)
            continue
        for name, value in leaves(figures):
            print(f"| {file.stem} | {name} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    if missing:
        print(f"\nno figures: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
