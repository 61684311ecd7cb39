"""The panels of the W&B dashboard as one local page, from run folders and without an account."""

from __future__ import annotations

import html
from collections.abc import Sequence

from nanochat.reports import page
from nanochat.reports.curves import curve, thin
from nanochat.reports.panels import BLOCKS, SUMMARY, Panel
from nanochat.reports.table import Table
from nanochat.studies.evidence import Run

POINTS = 300
"""of a line"""


def dashboard(runs: Sequence[Run], title: str) -> str:
    """The page: the same panels under the same headings; those without numbers in these runs are named at the end."""
    sections, empty, names = [], [], labels(runs)
    for block in BLOCKS:
        figures = {panel.title: figure(panel, runs, names) for panel in block.panels}
        sections.append(page.Section(block.heading, [page.columns(figures.values())] if any(figures.values()) else []))
        missing = [name for name, drawn in figures.items() if not drawn]
        if missing:
            empty.append(f"{', '.join(missing)}{f' (of runs with {block.needs})' if block.needs else ''}")
    sections.insert(1, page.Section("Summary", [page.columns([summary(runs, names).html()], "scroll")]))
    sections.append(page.Section("What they write", samples(runs, names)))
    if empty:
        said = page.paragraph(f"{'; '.join(empty)}.", "soft")
        sections.append(page.Section("Panels without numbers in these runs", [said]))
    lead = [page.legend(names)] if len(runs) > 1 else [page.paragraph(runs[0].name, "soft")]
    return page.document(title, lead, sections, "Written by nanochat wandb dashboard --offline.")


def labels(runs: Sequence[Run]) -> list[str]:
    """What each run has of its own of the overrides, and its folder where that does not tell it from the others."""
    common = set.intersection(*(set(run.overrides) for run in runs))
    own = [" ".join(word for word in run.overrides if word not in common) for run in runs]
    return [name if own.count(name) == 1 and name else run.name for name, run in zip(own, runs, strict=True)]


def figure(panel: Panel, runs: Sequence[Run], names: Sequence[str]) -> str:
    """One panel of some runs, a line for each of its metrics; empty where none of them has any.

    names: of the runs.
    """
    lines = []
    for number, run in enumerate(runs):
        metrics = panel.found(name for row in run.rows[:1] for name in row)
        clock = dict(run.clock) if panel.against == "time" else {}
        for name in metrics:
            points = [
                (place, value)
                for step, value in thin(curve(run.rows, name))
                if (place := clock.get(step) if clock else step * run.tokens_per_step or None) is not None
            ]
            points = points[:: -(-len(points) // POINTS)] + points[-1:] if len(points) > POINTS else points
            if points and (panel.against == "tokens" or clock):
                label = names[number] if len(metrics) == 1 else f"{names[number]}: {name}"
                lines.append(page.Series(label, number, points, marks=len(points) <= 12))
    x = "tokens" if panel.against == "tokens" else "seconds of training"
    return page.lines(panel.title, x, panel.unit, lines)


def summary(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The figures of the summaries, a line for each run."""
    keys = [key for key in SUMMARY if any(_value(run, key) is not None for run in runs)]
    rows = []
    for run, name in zip(runs, names, strict=True):
        cells = [_text(_value(run, key)) for key in keys]
        rows.append([name, str(run.summary.get("status", run.problem)), *cells])
    return Table("", ["run", "status", *keys], rows)


def samples(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """The last texts of every run."""
    cards = [
        f'<div data-arm="{number}"><h3>{html.escape(names[number])}</h3>'
        + "".join(page.paragraph(prompt, "soft") + page.verbatim(text) for prompt, text in texts.items())
        + "</div>"
        for number, run in enumerate(runs)
        if (texts := run.last_samples())
    ]
    return [page.columns(cards, "samples")] if cards else []


def _value(run: Run, key: str) -> float | None:
    if key.startswith("best/"):
        found = [value for _, value in curve(run.rows, key.removeprefix("best/"))]
        return min(found, default=None)
    return run.number(key)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
