"""`nanochat bench save`: what saving every N steps costs a step, written beside training or in its way.

With one thread on a CPU the clock counts the process's CPU time, the writing thread's too: the ratio is that of a
machine without a core to spare.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat.bench.measure import paired_ratio, presets, report, rounds, seconds
from nanochat.bench.step import bare_step, build, configure
from nanochat.console import Parser, count, one_of
from nanochat.data.random_tokens import RandomTokens
from nanochat.reports.table import show
from nanochat.training.checkpoint_io import Writer, write


def arms(cfg: dict[str, Any], batch: int, every: int, folder: Path) -> tuple[dict[str, Callable[[], None]], Writer]:
    """Name -> a function that trains `every` steps and saves once, at their start."""
    module = build(cfg)
    optimizer = module.configure_optimizers()
    data = RandomTokens(module.gpt.config, batch, 1, module.device)
    writer = Writer(lambda path: None)

    def content() -> dict[str, Any]:
        return {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}

    def train() -> None:
        for _ in range(every):
            bare_step(module, optimizer, data.batches)

    def in_the_way() -> None:
        write(content(), folder / "last.ckpt")
        train()

    def beside() -> None:
        writer.take(content(), folder / "last.ckpt")
        train()
        writer.wait()

    bare_step(module, optimizer, data.batches)  # the optimizer's state is there from now on
    return {"none": train, "beside": beside, "in the way": in_the_way}, writer


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
        functions, writer = arms(cfg, options.batch, options.every, folder)
        timed = {name: (lambda function=function: seconds(function)) for name, function in functions.items()}
        taken = rounds(timed, options.repeats, warm_up=0, say=not options.json)
        size = (folder / "last.ckpt").stat().st_size
    ratios = {name: paired_ratio(times, taken["none"]) for name, times in taken.items()}
    spread = [a / b for a, b in zip(taken["beside"], taken["none"], strict=True)]
    step = sorted(taken["none"])[len(taken["none"]) // 2] / options.every
    figures = {
        "model": options.model, "optim": options.optim, "batch": options.batch, "every": options.every,
        "checkpoint_mb": size / 1e6, "step_seconds": step, "write_seconds": writer.seconds,
        "step_ratio_beside": ratios["beside"], "step_ratio_in_the_way": ratios["in the way"],
        "lowest_ratio_beside": min(spread), "highest_ratio_beside": max(spread),
    }  # fmt: skip
    if options.json:
        report(figures, True)
        return 0
    fastest = {name: f"{min(times) / options.every * 1e3:,.1f} ms" for name, times in taken.items()}
    show(
        f"{options.model}, {options.optim}, batch {options.batch}: a step, with a save every {options.every} steps",
        ["save", "time of a step (ratio)", "fastest round"],
        [[name, f"{ratio:.4f}", fastest[name]] for name, ratio in ratios.items()],
        [
            f"A checkpoint of {size / 1e6:,.1f} MB, written in {writer.seconds:.2f} s beside training.",
            f"Beside training, the ratios of {options.repeats} rounds: {min(spread):.4f} to {max(spread):.4f}.",
        ],
    )
    return 0
