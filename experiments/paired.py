"""What the studies share: real runs of `train.py`, one thread each, several at a time, and paired comparisons.

A run that is already there is not trained again, so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
# two-sided 95% quantiles of Student's t for n - 1 degrees of freedom
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass
class Result:
    """What a run says of itself."""

    folder: Path
    bpb: float  # bits per byte of validation text
    step_seconds: float
    state_bytes: int  # of the optimizer


def parser(description: str, steps: int, base: Sequence[str]) -> argparse.ArgumentParser:
    """Options of every study; `base` are the overrides of every run."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--steps", type=int, default=steps, help="of the equal-steps runs (default: %(default)s)")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    options.add_argument("--base", nargs="*", default=list(base), help="overrides of every run")
    options.add_argument("--out", type=Path, required=True, help="folder for the runs")
    return options


def train(overrides: Sequence[str], folder: Path, steps: int) -> Result:
    """Train, unless the folder holds the finished run; raises `RuntimeError` with the end of a failed run's words."""
    if not (folder / "summary.json").is_file():
        command = [
            sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={folder.resolve()}", "ckpt_path=auto",
            f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
            f"callbacks.checkpoint.every_n_train_steps={steps}", "~callbacks.sampler", "~callbacks.loss_plot",
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    config = OmegaConf.load(folder / "config.yaml")
    tokens = config.data.batch_size * config.data.seq_len * config.trainer.accumulate_grad_batches
    # the later half: a filter has set in by then, and the machine has warmed up
    speeds = [float(row["train/tokens_per_second"]) for row in rows[len(rows) // 2 :]]
    state = next(int(float(row["optim/bytes"])) for row in reversed(rows) if row["optim/bytes"])
    print(f"{folder.name}: {float(rows[-1]['val/bpb']):.4f}", file=sys.stderr, flush=True)
    return Result(folder, float(rows[-1]["val/bpb"]), tokens / statistics.median(speeds), state)


def compare(
    options: argparse.Namespace, arms: dict[str, list[str]], baseline: str, clock: Sequence[str]
) -> dict[str, list[Result]]:
    """Train all arms for the same number of steps, and those of `clock` for the steps that take the baseline's time.

    Every run has its schedule complete; steps in equal time come from the median speeds of the first pass. Seeds are
    paired: each difference is to the baseline of the same seed, which sees the same text in the same order. Prints the
    table and returns the equal-steps runs by arm.
    """
    seeds = range(options.seeds)

    def run(arm: str, seed: int, steps: int, kind: str) -> Result:
        return train([*options.base, *arms[arm], f"seed={seed}"], options.out / f"{kind}-{arm}-{seed}", steps)

    with ThreadPoolExecutor(options.jobs) as pool:
        # seed by seed, so that the arms of a pair share the machine's mood
        first = {(arm, s): pool.submit(run, arm, s, options.steps, "steps") for s in seeds for arm in arms}
        equal = {arm: [first[arm, s].result() for s in seeds] for arm in arms}
        seconds = {arm: statistics.median(r.step_seconds for r in equal[arm]) for arm in arms}
        steps = {arm: max(1, round(options.steps * seconds[baseline] / seconds[arm])) for arm in clock}
        second = {(arm, s): pool.submit(run, arm, s, steps[arm], "clock") for s in seeds for arm in clock}
        timed = {arm: [second[arm, s].result() for s in seeds] for arm in clock}
    print(f"\n{options.steps} steps, {options.seeds} paired seeds, {' '.join(options.base)}\n")
    print("| arm | step / baseline | bpb, equal steps | difference | steps in equal time | bpb there | difference |")
    print("|---|---|---|---|---|---|---|")
    for arm in arms:
        cells = [arm, f"{seconds[arm] / seconds[baseline]:.3f}", *_cells(equal[arm], equal[baseline])]
        if arm in timed:
            cells += [str(steps[arm]), *_cells(timed[arm], equal[baseline])]
        print("| " + " | ".join([*cells, *[""] * (7 - len(cells))]) + " |")
    return equal


def _cells(results: list[Result], baseline: list[Result]) -> list[str]:
    mean = f"{statistics.mean(r.bpb for r in results):.4f}"
    return [mean, "" if results is baseline else difference(results, baseline)]


def difference(results: Sequence[Result], baseline: Sequence[Result]) -> str:
    """Mean of the paired differences in bits per byte and half the width of its 95% interval (Student's t)."""
    gaps = [a.bpb - b.bpb for a, b in zip(results, baseline, strict=True)]
    if len(gaps) < 2:
        return f"{gaps[0]:+.4f}"
    half = STUDENT[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{statistics.mean(gaps):+.4f} ± {half:.4f}"
