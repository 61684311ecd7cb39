"""One table for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_NUMBER = re.compile(r"[+-]?\d")
WIDTH = 160
"""columns where the output is not a terminal"""


@dataclass(frozen=True)
class Table:
    """Headings and rows of cells.

    Cells are texts, or numbers: floats are shown with three significant digits. A column is set to the right when at
    least half of its cells that are not empty begin with a number.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    def cells(self) -> list[list[str]]:
        """The rows as texts."""
        return [[f"{cell:,.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """For each column whether it is set to the right."""
        columns = [[row[i] for row in self.cells() if row[i]] for i in range(len(self.headings))]
        return [2 * sum(bool(_NUMBER.match(cell)) for cell in column) >= max(1, len(column)) for column in columns]

    def show(self) -> None:
        """Print it."""
        from rich import table
        from rich.console import Console
        from rich.text import Text

        drawn = table.Table(title=Text(self.title) if self.title else None, title_justify="left")
        for heading, right in zip(self.headings, self.numeric(), strict=True):
            if right:
                drawn.add_column(Text(heading), justify="right", no_wrap=True)
            else:
                drawn.add_column(Text(heading), overflow="fold")
        for row in self.cells():
            drawn.add_row(*map(Text, row))  # a Text: brackets in a cell are not markup
        console = Console(highlight=False, markup=False)
        if not console.is_terminal:
            console.width = WIDTH
        console.print(drawn)
        for note in self.notes:
            console.print(note, soft_wrap=True)

    def markdown(self) -> str:
        """It as Markdown, with the title as a line above and the notes below."""
        rules = ["---:" if right else "---" for right in self.numeric()]
        lines = [[_markdown(heading) for heading in self.headings], rules]
        lines += [[_markdown(cell) for cell in row] for row in self.cells()]
        head = [f"{self.title}:", ""] if self.title else []
        foot = ["", *self.notes] if self.notes else []
        return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines), *foot])

    def html(self) -> str:
        """It as an HTML element; every text is escaped."""
        classes = [' class="number"' if right else "" for right in self.numeric()]
        head = "".join(f"<th{c}>{html.escape(h)}</th>" for c, h in zip(classes, self.headings, strict=True))
        rows = [
            "".join(f"<td{c}>{html.escape(cell)}</td>" for c, cell in zip(classes, row, strict=True))
            for row in self.cells()
        ]
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        notes = "".join(f"\n<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>{notes}"


def _markdown(cell: str) -> str:
    for mark in "\\|<":  # a backslash first; what looks like HTML is text
        cell = cell.replace(mark, f"\\{mark}")
    return " ".join(cell.splitlines())


def show(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]], notes: Sequence[str] | None = None
) -> None:
    """Print a table."""
    Table(title, headings, rows, notes or ()).show()
