"""`nanochat compare`: does a technique pay, on this data and this machine? Matched runs, paired seeds, one table.

    nanochat compare data=text 'data.paths=[notes.txt]' --arms optim=muon8bit +mtp=on "+mhc=on mhc.streams=2"

Every arm is the plain run with other words: the same text in the same order for the same seed. All are real runs of
`nanochat train`, each in a folder of its own, and a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.config.compose import compose
from nanochat.config.schema import key_of
from nanochat.console import Parser, count
from nanochat.device import find_device
from nanochat.errors import UserError
from nanochat.files import shown
from nanochat.studies.runner import compare, compose_arm, merged
from nanochat.studies.statistics import MOST_SEEDS, Comparison
from nanochat.studies.tune import parse, tune

PLAIN = "plain"
TECHNIQUES = ("optim=adamw", "optim=muon8bit", "optim=galore8bit", "+mtp=on", "+collider=on", "+mhc=on")
"""the arms when none are named"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that a comparison and the studies share."""
    jobs = 1 if find_device().type == "cuda" else os.cpu_count() or 1
    parser.add_argument("--seeds", type=seeds, default=3, help="paired seeds (3)")
    parser.add_argument("--jobs", type=count, default=jobs, help=f"runs at a time ({jobs} here)")


def seeds(text: str) -> int:
    """Option type: how many seeds."""
    value = count(text)
    if value > MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text} must be at most {MOST_SEEDS}")
    return value


def study_parser(description: str | None, steps: int, base: Sequence[str]) -> argparse.ArgumentParser:
    """Options of a study in `experiments/`: `base` are the overrides of every run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=count, default=steps, help="of the equal-steps runs (default: %(default)s)")
    parser.add_argument("--base", nargs="*", default=list(base), help="overrides of every run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    add_options(parser)
    return parser


def study(options: argparse.Namespace, arms: Mapping[str, Sequence[str]], timed: Sequence[str]) -> Comparison:
    """Compare the arms of a study, of which the first is the plain one, and print the table."""
    found = compare(options.base, arms, options.out, options.steps, options.seeds, options.jobs, timed)
    print(f"\n{options.steps} steps, {options.seeds} paired seeds, {' '.join(options.base)}\n\n{found.markdown()}")
    return found


def arms_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """The arms by what the user wrote, the plain one first; raises `UserError` for one without words."""
    arms: dict[str, list[str]] = {PLAIN: []}
    for text in texts:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"--arms {text!r}: {error}.") from error
        if not words:
            raise UserError(f"--arms {text!r} changes nothing of the plain run.")
        arms[" ".join(words)] = words
    return arms


SAME = ("data", "tokenizer", "seed", "trainer.accumulate_grad_batches", "model.seq_len")
"""what the arms of a pair must share, or they would not see the same text in the same order"""


def _at(cfg: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _distinct(base: Sequence[str], arms: Mapping[str, list[str]]) -> Iterator[str]:
    """Names of the arms whose configuration is not the plain one's; composing finds their mistakes."""
    plain = compose_arm(base)
    for name, words in arms.items():
        try:
            arm = plain if name == PLAIN else compose_arm(merged(base, words))
        except UserError as error:
            raise UserError(f"--arms {name!r}: {error}") from error
        if other := [key for key in SAME if _at(arm, key) != _at(plain, key)]:
            raise UserError(f"--arms {name!r} changes {', '.join(other)}, which pairs must share.")
        if name == PLAIN or arm != plain:
            yield name


def parser() -> Parser:
    """The command's options."""
    options = Parser("compare", __doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("overrides", nargs="*", help="of every run, as for training, such as experiment=tiny")
    options.add_argument("--arms", nargs="+", metavar="WORDS", help=f"an arm each ({' '.join(TECHNIQUES)})")
    options.add_argument("--steps", type=count, help="of each run (trainer.max_steps)")
    options.add_argument("--equal-time", action="store_true", help="also train each arm for the plain run's time")
    options.add_argument(
        "--tune", metavar="KEY=VALUES", help="choose a value for each arm first: optim.lr=log(0.003,0.1,5)"
    )
    options.add_argument("--out", type=Path, help="folder of the runs (outputs/DATE/TIME-compare)")
    add_options(options)
    return options


def _to_tune(text: str, base: Sequence[str], arms: Mapping[str, list[str]]) -> tuple[str, list[str]]:
    """What `--tune` says, tried on every arm's configuration; raises `UserError` when it fits one of them not."""
    key, values = parse(text)
    if key in ("seed", "trainer.max_steps") or any(key == same or key.startswith(f"{same}.") for same in SAME):
        raise UserError(f"--tune {text}: {key} is what all runs share.")
    for name, words in arms.items():
        if key in map(key_of, words):
            raise UserError(f"--arms {name!r} sets {key}, which --tune is to choose.")
        for value in (values[0], values[-1]):
            try:
                compose_arm(merged(merged(base, words), [f"{key}={value}"]))
            except UserError as error:
                raise UserError(f"--tune {text}, arm {name!r}: {error}") from error
    return key, values


def _end(*_: object) -> None:
    raise SystemExit(143)


def main(argv: list[str]) -> int:
    """Train, print the table and write it into the folder; returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    base, given = options.overrides, options.arms
    arms = arms_of(given or TECHNIQUES)
    for word in (*base, *chain(*arms.values())):
        if key_of(word) in ("seed", "ckpt_path", "hydra.run.dir") or word in ("-m", "--multirun"):
            raise UserError(f"{word} does not go with compare, which sets it for each run.")
    if options.steps:
        base = merged(base, [f"trainer.max_steps={options.steps}"])
    steps = compose(base)["trainer"]["max_steps"]
    distinct = list(_distinct(base, arms))
    for name in [name for name in arms if name not in distinct]:
        if given:
            raise UserError(f"--arms {name!r} changes nothing of the plain run.")
        del arms[name]  # it is what the plain run is
    to_tune = _to_tune(options.tune, base, arms) if options.tune else None
    out = options.out or Path(time.strftime("outputs/%Y-%m-%d/%H-%M-%S-compare"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}.") from error
    runs = len(arms) * options.seeds
    if to_tune is not None:
        print(f"{len(arms) * len(to_tune[1])} runs choose {to_tune[0]} first.", file=sys.stderr)
    twice = " and those of the arms once more, at equal time" if options.equal_time else ""
    print(
        f"{runs} runs of {steps} steps, {options.jobs} at a time{twice}, in {shown(out)}; stopped, the same command "
        f"with --out {shown(out)} goes on.",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    timed = [name for name in arms if name != PLAIN] if options.equal_time else []
    before = signal.signal(signal.SIGTERM, _end)  # which would leave the runs behind
    tuned = None
    try:
        if to_tune is not None:
            tuned = tune(base, arms, out, steps, *to_tune, options.jobs)
            arms = {name: [*words, f"{tuned.key}={tuned.best(name)}"] for name, words in arms.items()}
        found = compare(base, arms, out, steps, options.seeds, options.jobs, timed)
    finally:
        signal.signal(signal.SIGTERM, before)
    heading = f"{' '.join(options.overrides) or 'the default run'}, {options.seeds} paired seeds"
    tables = [*([tuned.table(steps)] if tuned else []), *found.tables()]
    text = "\n\n".join(table.markdown() for table in tables)
    (out / "comparison.md").write_text(f"{heading}\n\n{text}\n", encoding="utf-8")
    figures = json.dumps({"base": base, **({"tuning": tuned.figures()} if tuned else {}), **found.figures()}, indent=1)
    (out / "comparison.json").write_text(figures, encoding="utf-8")
    if options.json:
        print(figures)
        return 0
    notes = ["Difference: in bits per byte, to the plain run of the same seed; less is better; ± is the 95% interval."]
    if tuned:
        tables.pop(0)
        tuned.table(steps).show()
        notes.append(
            f"Each arm has the {tuned.key} that was best for it; other options are those of its configuration."
        )
    else:
        notes.append("Each arm has the rates of its configuration; --tune optim.lr=log(0.003,0.1,5) chooses its own.")
    for table in tables:
        replace(table, title=f"{heading}: {table.title}", notes=notes if table is tables[-1] else ()).show()
    print(f"A page with curves and samples: nanochat report {shown(out)}")
    return 0
