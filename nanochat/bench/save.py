"""`nanochat bench save`: what saving every N steps costs a step, written beside training or in its way.

In each round every arm trains N steps, so that drift hits all alike, and ratios are paired. Three clocks:

- *training*: CPU time of the training thread, and what it waited for while it saved (the copy of the state, the disk,
  the save before). What else runs on the machine hardly moves it, so that it can tell a hundredth. It does not see
  how long the thread waits for Python's lock while the other one writes.
- *wall*: what the user sees, that wait among it; on a quiet machine alone.
- *CPU*: that of the whole process, the writing thread's too: the wall clock of a machine without a core to spare.

With more than one thread the first is the wall clock, since torch's threads work for the training thread.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat.bench.measure import paired_ratio, presets, report, rounds
from nanochat.bench.step import bare_step, build, configure
from nanochat.console import Parser, count, one_of
from nanochat.data.random_tokens import RandomTokens
from nanochat.reports.table import show
from nanochat.training.checkpoint_io import Writer, write


class Times(NamedTuple):
    """Seconds of one turn of an arm, by three clocks, and what its save alone kept the training thread from work."""

    training: float
    wall: float
    cpu: float
    held_up: float


CLOCKS = ("training", "wall", "cpu")


def timed(save: Callable[[], None], train: Callable[[], None], finish: Callable[[], None]) -> Times:
    """Save, train, and wait for the file, which the next save would do.

    Of the saving the wall clock counts, of the training the thread's own time.
    """
    alone = torch.get_num_threads() == 1
    wall, cpu = time.perf_counter(), time.process_time()
    save()
    held_up = time.perf_counter() - wall
    before = time.thread_time(), time.perf_counter()
    train()
    own, passed = time.thread_time() - before[0], time.perf_counter() - before[1]
    end = time.perf_counter()
    finish()
    held_up += time.perf_counter() - end
    return Times(held_up + (own if alone else passed), time.perf_counter() - wall, time.process_time() - cpu, held_up)


def arms(cfg: dict[str, Any], batch: int, every: int, folder: Path) -> tuple[dict[str, Callable[[], Times]], Writer]:
    """Name -> a turn that saves once and trains `every` steps."""
    module = build(cfg)
    optimizer = module.configure_optimizers()
    data = RandomTokens(module.gpt.config, batch, 1, module.device)
    writer = Writer(lambda path: None)
    path = folder / "last.ckpt"

    def content() -> dict[str, Any]:
        return {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}

    def train() -> None:
        for _ in range(every):
            bare_step(module, optimizer, data.batches)
        if module.device.type == "cuda":
            torch.cuda.synchronize()

    def nothing() -> None:
        pass

    bare_step(module, optimizer, data.batches)  # the optimizer's state is there from now on
    return {
        "none": lambda: timed(nothing, train, nothing),
        "beside": lambda: timed(lambda: writer.take(content(), path), train, writer.wait),
        "in the way": lambda: timed(lambda: write(content(), path), train, nothing),
    }, writer


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench save", __doc__, repeats=5)
    parser.add_argument("--model", type=one_of(presets()), default="tiny", help="a preset (tiny)")
    parser.add_argument("--optim", default="muon", help="an optimizer (muon)")
    parser.add_argument("--batch", type=count, default=8, help="sequences of a step (8)")
    parser.add_argument("--every", type=count, default=100, help="steps between two saves (100)")
    parser.add_argument("--folder", type=Path, help="where to write (the system's folder for temporary files)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    cfg = configure(options.model, options.optim)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        turns, writer = arms(cfg, options.batch, options.every, folder)
        taken = rounds(turns, options.repeats, warm_up=0, say=not options.json)
        size = (folder / "last.ckpt").stat().st_size
    by_clock = {
        clock: {name: [getattr(one, clock) for one in turns] for name, turns in taken.items()} for clock in CLOCKS
    }
    ratios = {
        clock: {name: paired_ratio(seconds, found["none"]) for name, seconds in found.items()}
        for clock, found in by_clock.items()
    }
    own = by_clock["training"]
    spread = [a / b for a, b in zip(own["beside"], own["none"], strict=True)]
    held_up = {name: statistics.median(one.held_up for one in turns) for name, turns in taken.items()}
    figures = {
        "model": options.model, "optim": options.optim, "batch": options.batch, "every": options.every,
        "checkpoint_mb": size / 1e6, "step_seconds": statistics.median(own["none"]) / options.every,
        "write_seconds": writer.seconds, "held_up_seconds": held_up["beside"],
        "step_ratio_beside": ratios["training"]["beside"],
        "step_ratio_in_the_way": ratios["training"]["in the way"],
        "wall_ratio_beside": ratios["wall"]["beside"], "cpu_ratio_beside": ratios["cpu"]["beside"],
        "lowest_ratio_beside": min(spread), "highest_ratio_beside": max(spread),
    }  # fmt: skip
    if options.json:
        report(figures, True)
        return 0
    show(
        f"{options.model}, {options.optim}, batch {options.batch}: a step, with a save every {options.every} steps",
        ["save", "training", "wall", "CPU", "held up"],
        [
            [name, *(f"{ratios[clock][name]:.4f}" for clock in CLOCKS), f"{held_up[name] * 1e3:,.0f} ms a save"]
            for name in turns
        ],
        [
            f"Ratios to no saving, medians of {options.repeats} rounds; a step takes "
            f"{figures['step_seconds'] * 1e3:,.1f} ms of the training thread.",
            f"A checkpoint of {size / 1e6:,.1f} MB, written in {writer.seconds:.2f} s beside training.",
            f"Beside training, the ratios of the rounds: {min(spread):.4f} to {max(spread):.4f}.",
        ],
    )
    return 0
