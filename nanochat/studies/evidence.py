"""What run folders, sweeps and comparisons hold, as arms: runs of one configuration that differ in their seed.

Only finished runs with a finite result take part in a mean. Every other run stays in the list, with the reason. Runs of
different text are kept in groups of their own, since bits per byte of one say nothing about the other.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from nanochat import run_lock
from nanochat.errors import UserError
from nanochat.reports.origin import FILE as COMMAND
from nanochat.run_folder import as_number, read_mapping, read_metrics, read_summary
from nanochat.studies.places import as_typed, from_here, name_of

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RUN_FILES = ("config.yaml", "summary.json", "metrics.csv")
BOOKKEEPING = ("seed", "tags", "ckpt_path", "task_name", "logger", "rate_scale", "data.seed", "data.cache_dir",
               "data.prefetch", *(f"callbacks.{name}" for name in
               ("checkpoint", "draft_acceptance", "loss_plot", "metrics", "progress", "sampler", "signals",
                "ternary_health")))  # fmt: skip
"""keys in which the runs of an arm may differ"""
TEXT = ("corpus", "paths", "val_paths", "extensions", "max_file_bytes", "val_tokens", "documents", "length", "entropy")
"""keys of the data that say which text it is"""
TUNING = "tuning"
"""folder of the runs by which a comparison chose its rates; they are not judged"""
DEPTH = 3  # folders below the one that is given, in which runs are looked for


@dataclass(eq=False)
class Run:
    """One run, whatever became of it.

    Args:
        folder: where it lies. name: the folder as a page shows it.
        config: resolved; empty where it cannot be read. overrides: of its command line.
        problem: why it takes no part in a mean; empty when it does.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    problem: str = ""
    root: Path | None = None
    """the folder that was given, in which it was found"""

    @property
    def name(self) -> str:
        return name_of(self.folder, self.root or self.folder)

    def typed(self, value: Any) -> Any:
        """A value of its configuration as a page shows it: with paths as they were typed."""
        return as_typed(from_here(value), self.overrides)

    @property
    def seed(self) -> Any:
        found = [word.removeprefix("seed=") for word in self.overrides if word.startswith("seed=")]
        return self.config.get("seed", found[-1] if found else None)

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """Those of metrics.csv."""
        try:
            return read_metrics(self.folder / "metrics.csv")
        except UserError:
            return []

    def number(self, key: str) -> float | None:
        """A finite number of its summary."""
        value = self.summary.get(key)
        return as_number(value) if isinstance(value, int | float) else None

    @cached_property
    def tokens_per_step(self) -> float:
        step, tokens = self.number("step"), self.number("tokens")
        return tokens / step if step and tokens else 0.0

    @cached_property
    def clock(self) -> list[tuple[int, float]]:
        """(step, seconds of training until then): validating, sampling and saving are left out."""
        passed, before, result = 0.0, 0, []
        for row in self.rows:
            if (speed := as_number(row.get("train/tokens_per_second"))) is not None and speed > 0:
                step = int(row["step"])
                passed += (step - before) * self.tokens_per_step / speed
                before = step
                result.append((step, passed))
        return result

    @cached_property
    def tokens_per_second(self) -> float | None:
        """Median over the later half of the run, when warm-ups are over."""
        speeds = [as_number(row.get("train/tokens_per_second")) for row in self.rows]
        known = [speed for speed in speeds if speed is not None]
        return median(known[len(known) // 2 :]) if known else self.number("train/tokens_per_second")

    def last_samples(self) -> dict[str, str]:
        """Prompt -> text, of the last samples it wrote."""
        try:
            text = (self.folder / "samples.md").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return {}
        last = re.split(r"^## Step \d+$", text, flags=re.MULTILINE)[-1]
        found = re.findall(r"^Prompt: (.*?)\n+(`{3,})\n(.*?)\n\2$", last, flags=re.MULTILINE | re.DOTALL)
        return {prompt: sample for prompt, _, sample in found}


@dataclass(eq=False)
class Arm:
    """The runs of one configuration."""

    name: str
    runs: list[Run]

    @property
    def good(self) -> list[Run]:
        """Those that take part in a mean, one for each seed."""
        return list({run.seed: run for run in reversed(self.runs) if not run.problem}.values())[::-1]

    @property
    def known(self) -> bool:
        """Whether anything says what its configuration is; of an empty folder nothing does."""
        return any(run.config or run.overrides for run in self.runs)

    def mean(self, values: Iterable[float | None]) -> float | None:
        """Of the known values."""
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None


@dataclass
class Group:
    """Arms that saw the same text, the one that the others are compared with first."""

    arms: list[Arm]
    metric: str

    @property
    def reference(self) -> Arm:
        return self.arms[0]

    def gaps(self, arm: Arm) -> list[float]:
        """Differences of an arm to the reference, for each seed that both have."""
        other = {run.seed: run.number(self.metric) for run in self.reference.good}
        pairs = [(run.number(self.metric), other.get(run.seed)) for run in arm.good]
        return [a - b for a, b in pairs if a is not None and b is not None]


# ---- reading --------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in some folders, each once.

    Raises:
        UserError: a folder is missing, or has no runs in it.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; give a run, a sweep, or a comparison.")
        found = list(_runs_below(path, DEPTH)) + _jobs_without_folder(path)
        if not any(run.config or run.summary for run in found):
            raise UserError(f"{path} has no runs in it; give a run, a sweep, or a comparison.")
        for run in found:
            run.root = path
        runs |= {run.folder.resolve(): run for run in found}
    return list(runs.values())


def _runs_below(folder: Path, depth: int) -> Iterator[Run]:
    if any((folder / name).is_file() for name in RUN_FILES):
        yield read_run(folder)
        return
    children = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    children = [path for path in children if path.name != TUNING]
    for child in sorted(children, key=_order):
        if depth and not child.is_symlink():
            yield from _runs_below(child, depth - 1)
    if depth < DEPTH and not children:
        yield Run(folder, problem="holds no run")


def _order(path: Path) -> list[Any]:
    """A comparison's plain runs first; numbers by their size."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
    return [not path.name.startswith("steps-plain-"), parts]


def _jobs_without_folder(sweep: Path) -> list[Run]:
    """Jobs of a sweep that failed before they trained; only its table knows them."""
    try:
        with open(sweep / "sweep.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []
    return [
        Run(
            sweep / str(row.get("job")), overrides=(row.get("overrides") or "").split(),
            problem=f"failed: {row['error']}",
        )
        for row in rows
        if row.get("error") and not row.get("folder")
    ]  # fmt: skip


def read_run(folder: Path) -> Run:
    """A run folder; what is wrong with it is its `problem`."""
    summary, (config, problem) = from_here(read_summary(folder)), _read_config(folder / "config.yaml")
    said = summary.get("overrides", read_mapping(folder / COMMAND).get("overrides"))
    overrides = list(map(str, said)) if isinstance(said, list) else []
    run = Run(folder, config, summary, overrides, problem)
    if not run.problem:
        run.problem = _problem(run)
    return run


def _problem(run: Run) -> str:
    status = run.summary.get("status")
    if status == "finished":
        known = [key for key in ("val/bpb", "val/loss") if key in run.summary]
        if not known:
            return "has no validation"
        return "" if run.number(known[0]) is not None else f"its {known[0]} is not a number"
    if run_lock.holder(run.folder) is not None:
        return "is training now"
    if status == "failed":
        return f"failed: {' '.join(str(run.summary.get('error', 'for an unknown reason')).split())}"
    step = run.summary.get("step", run.rows[-1]["step"] if run.rows else 0)
    return f"pruned by its search at step {step}" if status == "pruned" else f"stopped at step {step}"


def _read_config(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _LOADER)):
            return {}, "its config.yaml is not one that nanochat writes"  # aliases can grow without bounds
        found = yaml.load(text, _LOADER)
    except FileNotFoundError:
        return {}, "has no config.yaml"
    except (OSError, ValueError, yaml.YAMLError):
        return {}, "its config.yaml cannot be read"
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        return {}, "is not a run of nanochat"
    return found, ""


# ---- arms -----------------------------------------------------------------------------------------------------------


def groups_of(runs: Sequence[Run], against: str | None = None) -> list[Group]:
    """The arms of the runs, one group for each text.

    Args:
        against: name of the arm to compare with; by default the first of those with the fewest features.

    Raises:
        UserError: no arm has that name.
    """
    arms = arms_of(runs)
    if against is not None and against not in [arm.name for arm in arms]:
        raise UserError(
            f"--against {against!r}: there is no such arm; there are {', '.join(arm.name for arm in arms)}."
        )
    arms.sort(key=lambda arm: sum(word.startswith("+") and word.endswith("=on") for word in arm.name.split()))
    by_text: dict[str, list[Arm]] = {}
    for arm in sorted(arms, key=lambda arm: not arm.good):  # stable: those without a result go to what is there
        text = text_of(arm.good[0]) if arm.good else next(iter(by_text), "")
        by_text.setdefault(text, []).append(arm)
    groups = []
    for members in by_text.values():
        members.sort(key=lambda arm: (arm.name != against, not arm.good))
        has_bpb = any(run.number("val/bpb") is not None for arm in members for run in arm.good)
        groups.append(Group(members, "val/bpb" if has_bpb else "val/loss"))
    return groups


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Runs of one configuration together; names are what the command lines do not share."""
    by_setting: dict[str, list[Run]] = {}
    for run in (run for run in runs if run.config):
        by_setting.setdefault(json.dumps(setting(run.config), sort_keys=True, default=str), []).append(run)
    arms = [part for members in by_setting.values() for part in _by_text(members)]
    for run in (run for run in runs if not run.config):  # where it belongs is known by its command line alone
        mine = _own(run.overrides)
        match = next((arm for arm in arms if mine and any(_own(other.overrides) == mine for other in arm)), None)
        if match is None:
            arms.append([run])
        else:
            match.append(run)
    return [Arm(name, members) for name, members in zip(_names(arms), arms, strict=True)]


def _by_text(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one configuration apart where its files have changed in between."""
    parts: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: bool(run.problem)):
        parts.setdefault(next(iter(parts), "") if run.problem else text_of(run), []).append(run)
    return list(parts.values())


def _own(overrides: Sequence[str]) -> list[str]:
    return sorted(word for word in overrides if word.partition("=")[0] not in ("seed", "ckpt_path"))


def _names(arms: Sequence[list[Run]]) -> list[str]:
    said = [next((run.overrides for run in arm if run.overrides), []) for arm in arms]
    known = [set(words) for words in said if words]
    common = set.intersection(*known) if known else set()
    names = []
    for arm, words in zip(arms, said, strict=True):
        own = [word for word in words if word not in common]
        short = [
            word for word in own if not re.match(r"[+~]*(seed|ckpt_path|trainer\.val_check_interval|callbacks)\b", word)
        ]
        short = [f"{word.partition('=')[2]} steps" if word.startswith("trainer.max_steps=") else word for word in short]
        alone = str(arm[0].config.get("task_name") or arm[0].folder.name)
        names.append(" ".join(short) or ("plain" if words and len(arms) > 1 else alone))
    repeated = {name for name in names if names.count(name) > 1}
    return [f"{name} ({arm[0].name})" if name in repeated else name for name, arm in zip(names, arms, strict=True)]


def setting(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of a configuration, without those in which the runs of an arm may differ."""
    return {
        key: value
        for key, value in flat(config).items()
        if not any(key == other or key.startswith(f"{other}.") for other in BOOKKEEPING)
    }


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted keys and values of a tree; a list is one value."""
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{path}.{key}" if path else str(key)).items()}


def text_of(run: Run) -> str:
    """What runs must share for their bits per byte to be compared.

    The tokenizer is part of it only where a limited number of tokens is validated, or where there is no text.
    """
    data = run.config.get("data") if isinstance(run.config.get("data"), dict) else {}
    assert isinstance(data, dict)
    said = str(run.summary.get("data", ""))
    parts: dict[str, Any] = {key: data.get(key) for key in TEXT}
    if data.get("val_tokens") or run.number("val/bpb") is None:
        parts["tokenizer"] = run.config.get("tokenizer")
    parts["documents"] = re.findall(r"[\d,]+ documents of [\d.]+ MB|[\d,]+ of [\d.]+ MB", said)
    return json.dumps(parts, sort_keys=True, default=str)
