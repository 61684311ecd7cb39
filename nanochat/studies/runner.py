"""Matched runs: real runs of `nanochat train` with paired seeds, and what their differences show.

Arms are compared at equal steps and at equal time. A run that is there already is not trained again, so that a
comparison that was stopped goes on.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.config.compose import compose
from nanochat.config.schema import key_of
from nanochat.errors import UserError
from nanochat.files import quoted, shown
from nanochat.run_folder import read_metrics, read_summary

# two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip
MOST_SEEDS = len(STUDENT) + 1
UNNEEDED = ("sampler", "loss_plot")
"""callbacks that take time in every arm and say nothing in a comparison"""
FRESH_OR_ON = "ckpt_path=auto"
"""a run that was stopped goes on"""
_composing = threading.Lock()  # Hydra's settings are global


@dataclass
class Result:
    """What a finished run says of itself."""

    folder: Path
    bpb: float  # bits per byte of validation text
    step_seconds: float
    state_bytes: int  # of the optimizer


@dataclass
class Comparison:
    """The runs of each arm by seed, `plain` first."""

    steps: int
    equal: dict[str, list[Result]]
    timed: dict[str, list[Result]] = field(default_factory=dict)
    """runs of as many steps as fit into the plain run's time, by arm"""
    timed_steps: dict[str, int] = field(default_factory=dict)

    @property
    def plain(self) -> list[Result]:
        """The runs that the others are compared with."""
        return next(iter(self.equal.values()))

    def step_ratio(self, arm: str) -> float:
        """Seconds of the arm's step over those of the plain one's: the median over the pairs."""
        return statistics.median(
            a.step_seconds / b.step_seconds for a, b in zip(self.equal[arm], self.plain, strict=True)
        )

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, headings, cells) at equal steps, then at equal time if runs were made for that."""
        last = ["bits per byte", "difference", "verdict"]
        rows = []
        for arm, results in self.equal.items():
            first = [arm, f"{self.step_ratio(arm):.3f}", f"{results[0].state_bytes / 1e6:,.2f}"]
            rows.append([*first, *self._against_plain(results)])
        yield f"{self.steps} steps", ["arm", "step / plain", "optimizer MB", *last], rows
        if self.timed:
            runs = {next(iter(self.equal)): (self.steps, self.plain)}
            runs |= {arm: (self.timed_steps[arm], results) for arm, results in self.timed.items()}
            rows = [[arm, str(steps), *self._against_plain(results)] for arm, (steps, results) in runs.items()]
            yield "the same time", ["arm", "steps", *last], rows

    def _against_plain(self, results: list[Result]) -> list[str]:
        mean = f"{statistics.mean(r.bpb for r in results):.4f}"
        return (
            [mean, "", ""]
            if results is self.plain
            else [mean, difference(results, self.plain), verdict(results, self.plain)]
        )

    def markdown(self) -> str:
        """The tables for a document."""
        blocks = []
        for title, headings, rows in self.tables():
            lines = [headings, ["---"] * len(headings), *rows]
            blocks.append("\n".join([f"{title}:\n", *("| " + " | ".join(line) + " |" for line in lines)]))
        return "\n\n".join(blocks)

    def figures(self) -> dict[str, Any]:
        """The same as numbers, run by run."""
        arms: dict[str, Any] = {}
        for arm, results in self.equal.items():
            arms[arm] = {
                "bpb": [r.bpb for r in results],
                "step_ratio": self.step_ratio(arm),
                "optimizer_bytes": results[0].state_bytes,
            }
            if arm in self.timed:
                arms[arm] |= {"timed_steps": self.timed_steps[arm], "timed_bpb": [r.bpb for r in self.timed[arm]]}
        return {"steps": self.steps, "arms": arms}


def interval(results: Sequence[Result], plain: Sequence[Result]) -> tuple[float, float]:
    """Mean of the paired differences in bits per byte, and half the width of its 95% interval (Student's t).

    The half is infinite for a single pair.
    """
    gaps = [a.bpb - b.bpb for a, b in zip(results, plain, strict=True)]
    if len(gaps) < 2:
        return gaps[0], float("inf")
    return statistics.mean(gaps), STUDENT[len(gaps) - 2] * statistics.stdev(gaps) / len(gaps) ** 0.5


def difference(results: Sequence[Result], plain: Sequence[Result]) -> str:
    """The interval in words; less is better."""
    mean, half = interval(results, plain)
    return f"{mean:+.4f}" if half == float("inf") else f"{mean:+.4f} ± {half:.4f}"


def verdict(results: Sequence[Result], plain: Sequence[Result]) -> str:
    """What the interval shows."""
    mean, half = interval(results, plain)
    if half == float("inf"):
        return "one seed: no verdict"
    return "no difference shown" if abs(mean) <= half else "better" if mean < 0 else "worse"


# ---- runs -----------------------------------------------------------------------------------------------------------


class _Runner:
    """Starts runs, several at a time, and says on stderr how far it is."""

    def __init__(self, jobs: int) -> None:
        self.pool, self.jobs = ThreadPoolExecutor(jobs), jobs
        self.planned = self.done = 0
        self.start = time.monotonic()
        self.children: set[subprocess.Popen] = set()

    def submit(self, words: Sequence[str], folder: Path, steps: int) -> Future[Result]:
        """A run, unless its folder holds it already."""
        self.planned += 1
        return self.pool.submit(self._run, words, folder, steps)

    def _run(self, words: Sequence[str], folder: Path, steps: int) -> Result:
        result = train(words, folder, steps, threads=max(1, (os.cpu_count() or 1) // self.jobs), watch=self.children)
        self.done += 1
        passed = (time.monotonic() - self.start) / 60
        left = passed / self.done * (self.planned - self.done)
        print(
            f"{folder.name}: {result.bpb:.4f} ({self.done} of {self.planned} runs, {passed:.0f} min, "
            f"about {left:.0f} to go)",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return result

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # those that wait are never started; those that train save and end
            self.pool.shutdown(wait=False, cancel_futures=True)
            for child in list(self.children):
                child.send_signal(signal.SIGTERM)
        self.pool.shutdown()


def train(
    words: Sequence[str], folder: Path, steps: int, threads: int = 1, watch: set[subprocess.Popen] | None = None
) -> Result:
    """Train in a process of its own, unless the folder holds the finished run.

    Args:
        words: overrides. threads: of torch, on a CPU. watch: holds the process while it runs.

    Raises:
        UserError: the folder holds another run, or the run ended with a user's mistake (its sentence).
        RuntimeError: it ended otherwise, with the end of what it said.
    """
    words = [*words, f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    nodes = compose_arm(words)["callbacks"]
    words += [f"callbacks.checkpoint.every_n_train_steps={steps}"] if nodes.get("checkpoint") else []
    words += [f"~callbacks.{name}" for name in UNNEEDED if name in nodes]
    said = read_summary(folder)
    before = [word for word in said.get("overrides", []) if word != FRESH_OR_ON]
    if said and before != words:
        raise UserError(f"{shown(folder)} holds another run ({' '.join(before)}); choose another --out.")
    if said.get("status") != "finished":
        _train([FRESH_OR_ON, *words], folder, threads, set() if watch is None else watch)
    return read_result(folder, steps)


def compose_arm(words: Sequence[str]) -> dict[str, Any]:
    """`config.compose` from any thread, without the warnings, which the run repeats.

    Raises:
        ConfigError: as `compose`. UserError: the run would not write down what a comparison reads.
    """
    with _composing:
        logging.disable(logging.WARNING)
        try:
            cfg = compose(words)
        finally:
            logging.disable(logging.NOTSET)
    nodes = cfg["callbacks"] or {}
    if not (nodes.get("metrics") and nodes.get("throughput")):
        raise UserError("a comparison reads metrics.csv: it needs the callbacks metrics and throughput.")
    return cfg


def _train(words: list[str], folder: Path, threads: int, watch: set[subprocess.Popen]) -> None:
    command = [sys.executable, "-m", "nanochat.cli", "train", *words, f"hydra.run.dir={quoted(folder.resolve())}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        watch.add(child)
        try:
            out, err = child.communicate()
        finally:
            watch.discard(child)
    if child.returncode:
        mistakes = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
        if child.returncode == 2 and mistakes:
            raise UserError(f"{folder.name}: {mistakes[-1]}")
        raise RuntimeError(f"{shlex.join(command)} ended with code {child.returncode}:\n{out[-2000:]}\n{err[-2000:]}")


def read_result(folder: Path, steps: int) -> Result:
    """What a finished run wrote; raises `UserError` when it has not the figures of a comparison."""
    rows, summary = read_metrics(folder / "metrics.csv"), read_summary(folder)
    # the later half: warm-ups are over by then
    half = [row for row in rows if row.get("train/tokens_per_second")]
    speeds = [float(row["train/tokens_per_second"]) for row in half[len(half) // 2 :]]
    states = [float(row["optim/bytes"]) for row in rows if row.get("optim/bytes")]
    if not speeds or not states or not rows[-1].get("val/bpb"):
        raise UserError(f"{shown(folder)} lacks val/bpb, tokens per second or optimizer bytes in its metrics.csv.")
    if summary["step"] != steps:
        raise UserError(
            f"{shown(folder)} ended after {summary['step']} of {steps} steps; "
            "a comparison needs whole runs (no trainer.max_time, no early stopping)."
        )
    tokens = summary["tokens"] / summary["step"]
    return Result(folder, float(rows[-1]["val/bpb"]), tokens / statistics.median(speeds), int(states[-1]))


def compare(
    base: Sequence[str],
    arms: Mapping[str, Sequence[str]],
    out: Path,
    steps: int,
    seeds: int,
    jobs: int = 1,
    timed: Sequence[str] = (),
) -> Comparison:
    """Train all arms for the same number of steps, and some again for the steps that take the plain run's time.

    Every run has its schedule whole. Seeds are paired: a difference is between runs of one seed, which see the same
    text in the same order.

    Args:
        base: overrides of every run. arms: name -> further overrides; the first arm is the one to compare with.
        out: folder of the runs. jobs: runs at a time. timed: arms that are compared at equal time, too.
    """
    with _Runner(jobs) as runner:

        def results(kind: str, steps_of: Mapping[str, int]) -> dict[str, list[Result]]:
            planned: dict[str, list[Future[Result]]] = {arm: [] for arm in steps_of}
            # seed by seed, so that the arms of a pair share the machine's mood
            for seed in range(seeds):
                for arm, number in steps_of.items():
                    name = re.sub(r"[^\w.=+-]+", "_", f"{kind}-{arm}-{seed}")
                    words = [*merged(base, arms[arm]), f"seed={seed}"]
                    planned[arm].append(runner.submit(words, out / name, number))
            _settle(chain(*planned.values()))
            return {arm: [future.result() for future in futures] for arm, futures in planned.items()}

        found = Comparison(steps, results("steps", dict.fromkeys(arms, steps)))
        found.timed_steps = {arm: max(1, round(steps / found.step_ratio(arm))) for arm in timed}
        found.timed = results("time", found.timed_steps)
    return found


def _settle(futures: Iterable[Future[Result]]) -> None:
    """Wait until all are there; the first failure is raised as soon as it is known."""
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result()


def merged(base: Sequence[str], words: Sequence[str]) -> list[str]:
    """The base's overrides with an arm's: of two words for one key the arm's stays."""
    own = {key_of(word) for word in words}
    return [*(word for word in base if key_of(word) not in own), *words]
