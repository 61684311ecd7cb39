"""What the studies share: real runs of `train.py`, one thread each, several at a time, and paired comparisons.

Every arm of a study is trained twice for each seed: for the same number of steps, and for the number of steps that
takes the baseline's time (from the median speeds of the first pass), each with its schedule complete. A run that is
already there is not trained again, so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass
class Result:
    """What a run says of itself."""

    folder: Path
    bpb: float
    step_seconds: float
    steps: int


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every study."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--steps", type=int, default=400, help="of the equal-steps runs")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    options.add_argument("--base", nargs="*", default=["experiment=tiny"], help="overrides of every run")
    options.add_argument("--out", type=Path, required=True, help="folder for the runs")
    return options


def train(overrides: Sequence[str], folder: Path, steps: int) -> Result:
    """Train, unless the folder holds the finished run."""
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
    config = json.loads(json.dumps(_config(folder)))
    tokens = config["data"]["batch_size"] * config["data"]["seq_len"] * config["trainer"]["accumulate_grad_batches"]
    # the later half: a filter has set in by then, and the machine has warmed up
    speeds = [float(row["train/tokens_per_second"]) for row in rows[len(rows) // 2 :]]
    return Result(folder, float(rows[-1]["val/bpb"]), tokens / statistics.median(speeds), len(rows))


def _config(folder: Path) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # type: ignore[return-value]


def compare(options: argparse.Namespace, arms: dict[str, list[str]], baseline: str) -> dict[str, list[Result]]:
    """Train all arms and print the table; returns the equal-steps runs by arm.

    Seeds are paired: each difference is to the baseline of the same seed, which sees the same text in the same order.
    """
    seeds = range(options.seeds)

    def run(arm: str, seed: int, steps: int, kind: str) -> Result:
        return train([*options.base, *arms[arm], f"seed={seed}"], options.out / f"{kind}-{arm}-{seed}", steps)

    with ThreadPoolExecutor(options.jobs) as pool:
        # seed by seed, so that the arms of a pair share the machine's mood
        first = {(arm, s): pool.submit(run, arm, s, options.steps, "steps") for s in seeds for arm in arms}
        equal = {arm: [first[arm, s].result() for s in seeds] for arm in arms}
        seconds = {arm: statistics.median(r.step_seconds for r in equal[arm]) for arm in arms}
        steps = {arm: max(1, round(options.steps * seconds[baseline] / seconds[arm])) for arm in arms}
        second = {
            (arm, s): pool.submit(run, arm, s, steps[arm], "clock") for s in seeds for arm in arms if arm != baseline
        }
        clock = {arm: equal[arm] if arm == baseline else [second[arm, s].result() for s in seeds] for arm in arms}
    print(f"\n{options.steps} steps, {options.seeds} paired seeds, {' '.join(options.base)}\n")
    print(
        "| arm | step / baseline | bpb, equal steps | difference | steps in equal time | bpb, equal time | difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for arm in arms:
        cells = [arm, f"{seconds[arm] / seconds[baseline]:.3f}"]
        for results, extra in ((equal, []), (clock, [str(steps[arm])])):
            values = [r.bpb for r in results[arm]]
            gaps = [a - b.bpb for a, b in zip(values, results[baseline], strict=True)]
            cells += [*extra, f"{statistics.mean(values):.4f}", _gap(gaps) if arm != baseline else ""]
        print("| " + " | ".join(cells) + " |")
    return equal


def _gap(gaps: list[float]) -> str:
    """Mean paired difference and its standard error."""
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return f"{statistics.mean(gaps):+.4f} ± {error:.4f}"
