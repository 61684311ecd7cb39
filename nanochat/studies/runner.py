"""Matched runs: real runs of `nanochat train` with paired seeds, each in a process of its own.

Arms are compared at equal steps and at equal time. A run that is there already is not trained again, so that a
comparison that was stopped goes on.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from nanochat.config.compose import compose
from nanochat.config.schema import key_of
from nanochat.errors import UserError
from nanochat.files import quoted, shown
from nanochat.run_folder import read_metrics, read_summary
from nanochat.studies.statistics import Comparison, Result

UNNEEDED = ("sampler", "loss_plot")
"""callbacks that take time in every arm and say nothing in a comparison"""
FRESH_OR_ON = "ckpt_path=auto"
"""a run that was stopped goes on"""
_composing = threading.Lock()  # Hydra's settings are global


class Runner:
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

    def __enter__(self) -> Runner:
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
    command = [sys.executable, "-m", "nanochat.cli", "train", *words, f"hydra.run.dir={quoted(folder)}"]
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
    return Result(folder, float(rows[-1]["val/bpb"]), tokens / median(speeds), int(states[-1]))


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
    with Runner(jobs) as runner:

        def results(kind: str, steps_of: Mapping[str, int]) -> dict[str, list[Result]]:
            planned: dict[str, list[Future[Result]]] = {arm: [] for arm in steps_of}
            # seed by seed, so that the arms of a pair share the machine's mood
            for seed in range(seeds):
                for arm, number in steps_of.items():
                    name = folder_name(f"{kind}-{arm}-{seed}")
                    words = [*merged(base, arms[arm]), f"seed={seed}"]
                    planned[arm].append(runner.submit(words, out / name, number))
            _settle(chain(*planned.values()))
            return {arm: [future.result() for future in futures] for arm, futures in planned.items()}

        found = Comparison(steps, results("steps", dict.fromkeys(arms, steps)))
        found.timed_steps = {arm: max(1, round(steps / found.step_ratio(arm))) for arm in timed}
        found.timed = results("time", found.timed_steps)
    return found


def folder_name(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", text)


def _settle(futures: Iterable[Future[Result]]) -> None:
    """Wait until all are there; the first failure is raised as soon as it is known."""
    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
        future.result()


def merged(base: Sequence[str], words: Sequence[str]) -> list[str]:
    """The base's overrides with an arm's: of two words for one key the arm's stays."""
    own = {key_of(word) for word in words}
    return [*(word for word in base if key_of(word) not in own), *words]
