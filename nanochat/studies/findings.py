"""What the arms of a report show: the verdict, the tables, and what has to be said beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from nanochat.console import clock_time
from nanochat.reports.table import Table
from nanochat.studies.evidence import Arm, Group, Run, flat, setting
from nanochat.studies.statistics import in_words, judge, mean_interval

UNITS = {"val/bpb": "bits per byte", "val/loss": "nats per token"}
MANY = 3  # arms, from which on some interval misses zero by chance
MEMORY = {"memory/peak_bytes": "peak GPU MB", "peak_resident_bytes": "peak MB"}


def question(groups: Sequence[Group]) -> str:
    """What the runs can answer."""
    arms = [arm for group in groups for arm in group.arms if arm.known]
    if len(arms) == 1:
        return f"How good is {arms[0].name}?"
    group = groups[0]
    others = [arm.name for arm in group.arms[1:] if arm.known]
    if not others:
        return "How good are these runs, each on its own text?"
    named = " or ".join(others)
    if len(others) > MANY or len(named) > 60:
        named = f"any of {len(others)} arms" if len(others) > 1 else named
    ending = ", at equal steps?" if _equal_steps(group) else "?"
    return f"Is {named} better than {group.reference.name}{ending}"


def verdict(group: Group) -> str:
    """The answer in one sentence."""
    unit, reference = UNITS[group.metric], group.reference
    if not reference.good:
        return "No run has finished with a result."
    others = [arm for arm in group.arms[1:] if arm.known]
    if not others:
        mean, half = mean_interval(_values(group, reference))
        spread = f" ± {half:.4f} (95%, {len(reference.good)} seeds)" if len(reference.good) > 1 else ", one seed"
        return f"{reference.name} reaches {mean:.4f} {unit}{spread}."
    judged: dict[str, list[str]] = {}
    for arm in others:
        gap = _difference(group, arm)
        judged.setdefault(_verdict(group, arm), []).append(f"{arm.name} ({gap})" if gap else arm.name)
    parts = []
    for said, text in (("better", "better than"), ("worse", "worse than"), ("no difference shown", "")):
        if names := judged.get(said):
            be = "is" if len(names) == 1 else "are"
            parts.append(
                f"{_list(names)} {be} {text} {reference.name}" if text
                else f"for {_list(names)} no difference to {reference.name} is shown"
            )  # fmt: skip
    rest = {
        "one seed: no verdict": "{} had one seed in common with {}, which allows no verdict",
        "no common seed": "{} had no seed in common with {}, so nothing is said of it",
        "no result": "{} came to no result",
    }
    parts += [text.format(_list(judged[key]), reference.name) for key, text in rest.items() if key in judged]
    sentence = "; ".join(parts)
    if sentence.startswith("for "):  # a name keeps its small letters
        sentence = f"F{sentence[1:]}"
    return f"{sentence}, in {unit}."


def _list(names: Sequence[str]) -> str:
    if len(names) > MANY + 1:
        names = [*names[:MANY], f"{len(names) - MANY} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _values(group: Group, arm: Arm) -> list[float]:
    return [value for run in arm.good if (value := run.number(group.metric)) is not None]


def _equal_steps(group: Group) -> bool:
    return len({run.summary.get("step") for arm in group.arms for run in arm.good}) == 1


def result(group: Group) -> Table:
    """How good each arm is."""
    columns: dict[str, list[str]] = {
        "arm": [arm.name for arm in group.arms],
        "seeds": [_seeds(arm) for arm in group.arms],
        UNITS[group.metric]: [_mean(_values(group, arm)) for arm in group.arms],
    }
    if len(group.arms) > 1:
        columns["difference"] = [_difference(group, arm) for arm in group.arms]
        columns["verdict"] = [_verdict(group, arm) for arm in group.arms]
    return _table(columns)


def cost(group: Group, sizes: dict[str, str]) -> Table:
    """What each arm takes: time and memory of training, and the size of the model.

    Args:
        sizes: name of an arm -> megabytes of its file.
    """
    figures: dict[str, list[float | None]] = {
        "tokens": [arm.mean(run.number("tokens") for run in arm.good) for arm in group.arms],
        "tokens/s": [arm.mean(run.tokens_per_second for run in arm.good) for arm in group.arms],
        "trained for": [arm.mean(seconds(run) for run in arm.good) for arm in group.arms],
        "optimizer MB": [megabytes(arm, "optim/bytes") for arm in group.arms],
        **{heading: [megabytes(arm, key) for arm in group.arms] for key, heading in MEMORY.items()},
        "parameters": [arm.mean(run.number("parameters") for run in arm.good) for arm in group.arms],
    }
    columns = {"arm": [arm.name for arm in group.arms]}
    for heading, values in figures.items():
        if any(value is not None for value in values):
            columns[heading] = [_figure(heading, value) for value in values]
    if any(sizes.get(arm.name) for arm in group.arms):
        columns["GGUF MB"] = [sizes.get(arm.name, "") for arm in group.arms]
    table = _table(columns)
    planned = any("~" in size for size in sizes.values())
    note = "~ is the size of the tensors in the file that nanochat export would write; nothing has been exported yet."
    return replace(table, notes=[note]) if planned else table


def _table(columns: dict[str, list[str]]) -> Table:
    return Table("", list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def _seeds(arm: Arm) -> str:
    good, all_seeds = len(arm.good), len({run.seed for run in arm.runs})
    return str(good) if good == all_seeds else f"{good} of {all_seeds}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = mean_interval(values)
    return f"{mean:.4f} ± {half:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _difference(group: Group, arm: Arm) -> str:
    gaps = [] if arm is group.reference else group.gaps(arm)
    return in_words(*mean_interval(gaps)) if gaps else ""


def _verdict(group: Group, arm: Arm) -> str:
    if arm is group.reference:
        return ""
    if not arm.good:
        return "no result"
    gaps = group.gaps(arm)
    return judge(*mean_interval(gaps)) if gaps else "no common seed"


def seconds(run: Run) -> float | None:
    """How long a run has trained; None where that is not known."""
    return run.clock[-1][1] if run.clock else None


def megabytes(arm: Arm, key: str) -> float | None:
    """The mean of a number of bytes over an arm's runs, in MB."""
    mean = arm.mean(run.number(key) for run in arm.good)
    return None if mean is None else mean / 1e6


def _figure(heading: str, value: float | None) -> str:
    if value is None:
        return ""
    if heading == "trained for":
        return clock_time(value) if value >= 60 else f"{value:.1f} s"
    return f"{value:,.2f}" if heading.endswith("MB") else f"{value:,.0f}"


def left_out(groups: Sequence[Group]) -> Table | None:
    """The runs that take no part in a mean, and why."""
    rows = [
        [arm.name, "" if run.seed is None else str(run.seed), run.problem, run.name]
        for arm in chain(*(group.arms for group in groups))
        for run in arm.runs
        if run.problem
    ]
    return Table("", ["arm", "seed", "why", "run"], rows) if rows else None


def every_run(group: Group) -> Table:
    """A row for each run that takes part."""
    rows = []
    for arm in group.arms:
        for run in arm.good:
            value, seconds = run.number(group.metric), run.number("seconds")
            rows.append([
                arm.name, str(run.seed), f"{value:.4f}", f"{run.summary.get('step', ''):,}",
                f"{run.tokens_per_second or 0:,.0f}", "" if seconds is None else clock_time(seconds), run.name,
            ])  # fmt: skip
    headings = ["arm", "seed", UNITS[group.metric], "steps", "tokens/s", "last session", "run"]
    return Table("", headings, rows)


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader has to know of the figures."""
    return list(dict.fromkeys(chain(*map(_notes_of, groups))))


def warnings(groups: Sequence[Group]) -> list[str]:
    """What may make the comparison wrong."""
    found = []
    if len(groups) > 1:
        found.append(f"These runs are of {len(groups)} different texts. They are shown apart and never averaged.")
    for group in groups:
        good = [run for arm in group.arms for run in arm.good]
        if len(group.arms) > 1 and good and not _equal_steps(group):
            found.append("The arms were not trained for the same number of steps.")
        for key, name in (("commit", "commits of nanochat"), ("torch", "versions of torch"), ("machine", "machines")):
            if len({run.summary.get(key) for run in good}) > 1:
                found.append(f"The runs are of different {name}.")
        for arm in group.arms[1:]:
            if arm.good and group.reference.good and not group.gaps(arm):
                found.append(f"{arm.name} and {group.reference.name} have no seed in common, so no pair can be made.")
    return list(dict.fromkeys(found))


def _notes_of(group: Group) -> Iterator[str]:
    if any(len(arm.good) > 1 for arm in group.arms):
        yield "± is half of the 95% interval of a mean over the seeds (Student's t)."
    if len(group.arms) > 1:
        yield (
            f"Differences are to {group.reference.name}, between runs of the same seed, which saw the same text in the "
            "same order; less is better."
        )
    if len(group.arms) > MANY + 1:
        yield (
            f"Each of the {len(group.arms) - 1} intervals is judged alone: one in twenty misses zero by chance, where "
            "there is no difference at all."
        )
    if any(run.clock for arm in group.arms for run in arm.good):
        yield (
            "Tokens/s is the median over the later half of a run; the time of training leaves out validating, sampling "
            "and saving. Runs that shared a machine slowed each other down."
        )


def differences(group: Group) -> tuple[Table, Table]:
    """What the configurations do not share: what was chosen, and what followed from a chosen option."""
    arms = [arm for arm in group.arms if arm.runs[0].config]
    settings = [setting(arm.runs[0].config) for arm in arms]
    written = [
        {key: arm.runs[0].typed(value) for key, value in values.items()}
        for arm, values in zip(arms, settings, strict=True)
    ]
    keys = sorted(set().union(*settings)) if settings else []
    differing = [key for key in keys if len({_text(values, key) for values in settings}) > 1]
    chosen = {name for arm in arms for name in _chosen(arm)}
    rows = [[name, *(_chosen(arm).get(name, "") for arm in arms)] for name in sorted(chosen)]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    follows = {row[0] for row in rows}
    said = {word.lstrip("+~").partition("=")[0] for arm in arms for run in arm.runs for word in run.overrides}
    direct, derived = [], []
    for key in differing:
        row = [key, *(_text(values, key) for values in written)]
        (derived if key.partition(".")[0] in follows and key not in said else direct).append(row)
    headings = ["key", *(arm.name for arm in arms)]
    return Table("", headings, rows + direct), Table("", headings, derived)


def _chosen(arm: Arm) -> dict[str, str]:
    """The options of groups that an arm's command line names."""
    top = {key for key, value in arm.runs[0].config.items() if isinstance(value, dict)}
    pairs = [word.lstrip("+").partition("=") for word in next((r.overrides for r in arm.runs if r.overrides), [])]
    return {name: option for name, _, option in pairs if name in top or name in ("experiment", "debug")}


def _text(values: dict[str, Any], key: str) -> str:
    if values.get(key, {}) == {}:
        return "—"
    return "null" if values[key] is None else str(values[key])


def curve_keys(group: Group) -> list[str]:
    """The metrics whose curves are shown."""
    validations = [sum(1 for row in run.rows if row.get(group.metric)) for arm in group.arms for run in arm.good]
    return ["train/loss", group.metric] if validations and min(validations) > 1 else ["train/loss"]


def shared_values(groups: Sequence[Group], key: str) -> list[str]:
    """The different values of a key of the summaries, in words."""
    runs = [run for group in groups for arm in group.arms for run in arm.good]
    return list(dict.fromkeys(str(run.summary[key]) for run in runs if run.summary.get(key)))


def flat_data(run: Run) -> dict[str, Any]:
    """The data's and the tokenizer's keys of a configuration that say what was trained on."""
    values = flat({key: run.config.get(key) or {} for key in ("data", "tokenizer")})
    hidden = ("data.seed", "data.prefetch", "data.cache_dir")
    return {key: run.typed(value) for key, value in values.items() if key not in hidden and value is not None}
