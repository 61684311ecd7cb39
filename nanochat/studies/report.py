"""`nanochat report`: one page that answers what some runs, a sweep or a comparison show.

    nanochat report outputs/latest                   the table here, and report.html in that folder
    nanochat report SWEEP OTHER_RUN --html page.html --md page.md

The page has everything inside: no script or font is loaded, and it can be mailed, printed and read offline.
"""

from __future__ import annotations

import argparse
import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat.console import Parser
from nanochat.errors import UserError
from nanochat.files import shown, write_text
from nanochat.reports import page
from nanochat.reports.curves import curve, smooth, thin
from nanochat.reports.table import Table
from nanochat.studies import findings
from nanochat.studies.evidence import Arm, Group, Run, groups_of, read_runs
from nanochat.studies.statistics import mean_interval

CURVE_POINTS = 150
NAMES = {"train/loss": "Training loss", "val/bpb": "Bits per byte of validation text", "val/loss": "Validation loss"}
UNIT = {"train/loss": "nats per token, smoothed", "val/bpb": "bits per byte", "val/loss": "nats per token"}


@dataclass
class Report:
    """The evidence in the order in which it is read.

    Args:
        sizes: name of an arm -> the megabytes of its file.
    """

    groups: list[Group]
    question: str
    sizes: dict[str, str] = field(default_factory=dict)

    def verdicts(self) -> list[str]:
        """One sentence for each text."""
        return [findings.verdict(group) for group in self.groups]

    def arms(self) -> list[Arm]:
        """All arms; the place of one is its number on the page."""
        return [arm for group in self.groups for arm in group.arms]

    def title(self, group: Group) -> str:
        """Which text a group is of, where there are several."""
        if len(self.groups) == 1 or not group.reference.good:
            return ""
        return str(group.reference.good[0].summary.get("data", ""))

    # ---- terminal -----------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Print the question, the answer and the table."""
        print(f"{self.question}\n")
        for group, verdict in zip(self.groups, self.verdicts(), strict=True):
            print(verdict)
            for table in (findings.result(group), findings.cost(group, self.sizes)):
                replace(table, title=self.title(group)).show()
        if (missing := findings.left_out(self.groups)) is not None:
            replace(missing, title="Left out of every mean").show()
        for text in (*findings.warnings(self.groups), *findings.notes(self.groups)):
            print(text)

    # ---- Markdown -----------------------------------------------------------------------------------------------

    def markdown(self) -> str:
        """The same for a document, with the configurations, the commands and the versions."""
        parts = [f"# {_plain(self.question)}"]
        for group, verdict in zip(self.groups, self.verdicts(), strict=True):
            parts += [f"## {_plain(title)}"] if (title := self.title(group)) else []
            parts += [f"**{_plain(verdict)}**", findings.result(group).markdown()]
            parts.append(findings.cost(group, self.sizes).markdown())
        if (missing := findings.left_out(self.groups)) is not None:
            parts += ["## Left out of every mean", missing.markdown()]
        said = (*findings.warnings(self.groups), *findings.notes(self.groups))
        parts.append("\n".join(f"- {_plain(text)}" for text in said))
        for group in self.groups:
            chosen, _ = findings.differences(group)
            parts += ["## What differed", chosen.markdown()] if chosen.rows else []
        parts += ["## Commands", _fenced("\n".join(self._commands()))]
        parts += ["## Where it ran", "\n".join(f"- {name}: {_plain(text)}" for name, text in self._origin().items())]
        return "\n\n".join(part for part in parts if part) + "\n"

    # ---- HTML ---------------------------------------------------------------------------------------------------

    def html(self) -> str:
        """The page."""
        lead = [page.paragraph(text, "verdict") for text in self.verdicts()]
        lead += [page.paragraph(text, "warn") for text in findings.warnings(self.groups)]
        sections = []
        for group in self.groups:
            head, cost = self.title(group), findings.cost(group, self.sizes)
            figure = page.columns([self._differences_figure(group)])
            explained = [page.paragraph(text, "note") for text in findings.notes([group])]
            lines = [page.paragraph(head, "soft")] if head else []
            sections.append(page.Section("Result", [*lines, _scrolled(findings.result(group)), figure, *explained]))
            sections.append(page.Section("Loss", [page.columns(self._curves(group))]))
            sections.append(page.Section("Cost", [_scrolled(cost), page.columns(self._costs(group))]))
            sections.append(page.Section("What they write", self._samples(group)))
            sections.append(page.Section("What differed in the configurations", _differences(group)))
        if (missing := findings.left_out(self.groups)) is not None:
            sections.insert(1, page.Section("Left out of every mean", [_scrolled(missing)]))
        runs = [_scrolled(findings.every_run(group)) for group in self.groups if group.reference.good]
        sections.append(page.Section("Every run", [page.details("One line each", "".join(runs))] if runs else []))
        commands = page.verbatim("\n".join(self._commands()))
        sections.append(page.Section("Commands", [commands] if self._commands() else []))
        sections.append(page.Section("Data", [page.facts(self._data_card(group)) for group in self.groups]))
        sections.append(page.Section("Where it ran", [page.facts(self._origin())]))
        if len(self.arms()) > 1:
            lead.append(page.legend([arm.name for arm in self.arms()]))
        written = time.strftime("%Y-%m-%d %H:%M")
        return page.document(self.question, lead, sections, f"Written by nanochat report, {written}.")

    def _number(self, arm: Arm) -> int:
        return next(i for i, other in enumerate(self.arms()) if other is arm)

    def _differences_figure(self, group: Group) -> str:
        rows = [
            page.Interval(arm.name, self._number(arm), *mean_interval(gaps))
            for arm in group.arms[1:]
            if (gaps := group.gaps(arm))
        ]
        title = f"Difference to {group.reference.name}, {findings.UNITS[group.metric]}, with 95% intervals"
        return page.intervals(title, findings.UNITS[group.metric], rows)

    def _curves(self, group: Group) -> list[str]:
        figures = []
        for key in findings.curve_keys(group):
            for against in ("tokens", "time"):
                lines = [
                    line for arm in group.arms if arm.good and (line := _line(arm, key, against, self._number(arm)))
                ]
                unit, factor = (
                    _time_unit([line.points[-1][0] for line in lines]) if against == "time" else ("tokens", 1.0)
                )
                lines = [_scaled(line, factor) for line in lines]
                seeds = max((len(arm.good) for arm in group.arms), default=0)
                note = "The band reaches from the lowest to the highest seed." if seeds > 1 else ""
                label = f"{unit} of training" if against == "time" else unit
                title = f"{NAMES[key]} against {'time' if against == 'time' else 'tokens'}"
                figures.append(page.lines(title, label, UNIT[key], lines, note))
        return figures

    def _costs(self, group: Group) -> list[str]:
        """Pareto plots of the metric against time and memory."""
        times = {arm.name: arm.mean(map(findings.seconds, arm.good)) for arm in group.arms}
        unit, factor = _time_unit([value for value in times.values() if value])
        memory = next(
            (key for key in findings.MEMORY if all(run.number(key) for arm in group.arms for run in arm.good)),
            "optim/bytes",
        )
        heading = {**findings.MEMORY, "optim/bytes": "optimizer MB"}[memory]
        axes = {
            f"{unit} of training": {name: value and value * factor for name, value in times.items()},
            heading: {arm.name: findings.megabytes(arm, memory) for arm in group.arms},
        }
        figures = []
        for (label, values), title in zip(axes.items(), ("Result against time", "Result against memory"), strict=True):
            dots = []
            for arm in group.arms:
                found = [value for run in arm.good if (value := run.number(group.metric)) is not None]
                if found and (x := values[arm.name]):
                    mean, half = mean_interval(found)
                    dots.append(page.Dot(arm.name, self._number(arm), x, mean, half if len(found) > 2 else 0.0))
            if len(dots) > 1:
                note = "Left and low is better; the line joins the arms that no other beats in both."
                figures.append(page.scatter(title, label, findings.UNITS[group.metric], dots, note))
        return figures

    def _samples(self, group: Group) -> list[str]:
        """The last samples of one run of each arm, prompt by prompt."""
        seeds = [{str(run.seed) for run in arm.good} for arm in group.arms if arm.good]
        common = sorted(set.intersection(*seeds)) if seeds else []
        runs = {
            arm: next((run for run in arm.good if common and str(run.seed) == common[0]), arm.good[0]).last_samples()
            for arm in group.arms
            if arm.good
        } if seeds else {}  # fmt: skip
        prompts = list(dict.fromkeys(prompt for samples in runs.values() for prompt in samples))
        elements = []
        for prompt in prompts:
            cards = [
                f'<div data-arm="{self._number(arm)}"><h3>{html.escape(arm.name)}</h3>'
                f"{page.verbatim(samples[prompt])}</div>"
                for arm, samples in runs.items()
                if prompt in samples
            ]
            elements.append(page.paragraph(f"After {prompt}", "soft") + page.columns(cards, "samples"))
        return elements

    def _commands(self) -> list[str]:
        keys = ("command", "resumed_by")
        found = [_typed(command) for key in keys for command in findings.shared_values(self.groups, key)]
        # a sweep that was resumed has the same words behind the other program
        return list(
            {
                command.removeprefix("python train.py ").removeprefix("nanochat train "): command
                for command in reversed(found)
            }.values()
        )[::-1]

    def _data_card(self, group: Group) -> dict[str, str]:
        good = group.reference.good
        if not good:
            return {}
        values = {key: str(value) for key, value in findings.flat_data(good[0]).items() if not key.endswith("_target_")}
        compression = good[0].summary.get("compression")
        beside = (
            ", ".join(f"{name} {value}" for name, value in compression.items()) if isinstance(compression, dict) else ""
        )
        described = str(good[0].summary.get("data", ""))
        return {"text": described, "compressors, bits per byte": beside, **values}

    def _origin(self) -> dict[str, str]:
        keys = {"machine": "machine", "nanochat": "nanochat", "commit": "commit", "torch": "torch", "python": "Python"}
        return {
            name: "; ".join(values)
            for key, name in keys.items()
            if (values := findings.shared_values(self.groups, key))
        }


def _differences(group: Group) -> list[str]:
    chosen, derived = findings.differences(group)
    if len(group.arms) < 2:
        return []
    elements = [_scrolled(chosen)] if chosen.rows else []
    count = len(derived.rows)
    return [*elements, page.details(f"{count} values that follow from these", _scrolled(derived) if count else "")]


def _scrolled(table: Table) -> str:
    return page.columns([table.html()], "scroll")


def _line(arm: Arm, key: str, against: str, number: int) -> page.Series | None:
    """The mean of an arm's seeds over the steps that all of them have, and the band of the lowest and the highest."""
    curves = []
    for run in arm.good:
        points = curve(run.rows, key)
        if key == "train/loss":
            points = smooth(thin(points))
        curves.append(dict(points))
    steps = sorted(set.intersection(*(set(points) for points in curves)))
    steps = steps[:: -(-len(steps) // CURVE_POINTS)] + steps[-1:] if len(steps) > CURVE_POINTS else steps
    clocks = [dict(run.clock) for run in arm.good]
    places = {step: _place(arm.good[0], clocks, step, against) for step in dict.fromkeys(steps)}
    known = {step: x for step, x in places.items() if x is not None}
    points = [(x, sum(values[step] for values in curves) / len(curves)) for step, x in known.items()]
    band = [(x, min(v[step] for v in curves), max(v[step] for v in curves)) for step, x in known.items()]
    if not points:
        return None
    return page.Series(arm.name, number, points, band if len(curves) > 1 else (), marks=len(points) <= 12)


def _place(run: Run, clocks: Sequence[Mapping[int, float]], step: int, against: str) -> float | None:
    """Where a step lies: tokens, or the seconds of training, a mean over the seeds."""
    if against == "tokens":
        return step * run.tokens_per_step or None
    values = [clock.get(step) for clock in clocks]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _time_unit(seconds: Sequence[float]) -> tuple[str, float]:
    longest = max(seconds, default=0.0)
    return ("hours", 1 / 3600) if longest > 7200 else ("minutes", 1 / 60) if longest > 180 else ("seconds", 1.0)


def _scaled(line: page.Series, factor: float) -> page.Series:
    points = [(x * factor, y) for x, y in line.points]
    return page.Series(line.name, line.arm, points, [(x * factor, a, b) for x, a, b in line.band], line.marks)


def _typed(command: str) -> str:
    """A recorded command as one would type it; earlier versions noted the program alone."""
    program, _, rest = command.partition(" ")
    if program in ("cli.py", "nanochat") and not rest.startswith("train "):
        return f"nanochat train {rest}"
    return f"python {command}" if program.endswith(".py") else command


def _plain(text: str) -> str:
    """Text that Markdown is to show as it is."""
    for mark in "\\`*_<[":
        text = text.replace(mark, f"\\{mark}")
    return text


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}" if text else ""


def file_sizes(arms: Sequence[Arm]) -> dict[str, str]:
    """Megabytes of each arm's exported file, or, with a "~", of the weights in one that is still to be written."""
    sizes: dict[str, str] = {}
    for arm in arms:
        for run in arm.good[:1]:
            written = [path.stat().st_size for path in sorted(run.folder.glob("*.gguf"))]
            if written:
                sizes[arm.name] = f"{written[0] / 1e6:,.2f}"
            elif (planned := _planned(run)) is not None:
                sizes[arm.name] = f"{planned / 1e6:,.2f} ~"
    return sizes


def _planned(run: Run) -> int | None:
    from nanochat.export.sizes import planned_file  # torch, which nothing else here needs
    from nanochat.model import GPTConfig

    try:
        return sum(planned_file(GPTConfig.from_json(run.folder / "model.json"))[1].values())
    except UserError:
        return None


def parser() -> Parser:
    """The command's options."""
    options = Parser("report", __doc__, as_json=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, sweeps and comparisons")
    options.add_argument("--html", type=Path, metavar="FILE", help="the page (report.html in the first folder)")
    options.add_argument("--md", type=Path, metavar="FILE", help="the same as Markdown")
    options.add_argument(
        "--against", metavar="ARM", help="the arm to compare with, by its name in the table (the first)"
    )
    options.add_argument("--question", help="the heading of the page")
    return options


def main(argv: list[str]) -> int:
    """Print the table and write the page; returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    groups = groups_of(read_runs(options.folders), options.against)
    report = Report(groups, options.question or findings.question(groups))
    report.sizes = file_sizes(report.arms())
    target = options.html or options.folders[0] / "report.html"
    write_text(target, report.html(), "--html")
    if options.md:
        write_text(options.md, report.markdown(), "--md")
    report.show()  # after the pages: whoever reads it may leave early, as in `nanochat report RUN | head`
    print(f"\nThe page is {shown(target)}")
    return 0
