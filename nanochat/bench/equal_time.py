"""`nanochat bench equal-time`: what is a model worth after the same wall-clock time? Ours beside other projects'.

Ours is a run as a user starts it, with everything that a run does. A peer trains its own model of the same width, depth
and heads with its own optimizer, in its fastest arithmetic, on the same prepared tokens; its rates warm up, stay, and
fall over the last 40% of the time. Both are validated on the same tokens afterwards, outside of the time.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.bench.measure import report, rounds
from nanochat.bench.peers import OURS, Arm, ArmFailed, Load, Peer, add_peer_option, current_load, open_arms
from nanochat.bench.step import bare_step, build
from nanochat.config.check import Checked
from nanochat.config.compose import compose
from nanochat.config.vocabulary import build_data, fit_vocabulary
from nanochat.console import Parser, count
from nanochat.data import DataModule
from nanochat.data.random_tokens import RandomTokens
from nanochat.device import find_device
from nanochat.errors import UserError
from nanochat.model.bitlinear import keep_trits
from nanochat.objectives import IGNORED
from nanochat.reports.table import show
from nanochat.run import settle, train
from nanochat.training.module import model_config

TRIAL_STEPS = 4


def configure(overrides: Sequence[str], seconds: int) -> dict[str, Any]:
    """The configuration of our run: the default one with the overrides, and the time.

    Raises `UserError` for overrides of what the bench decides, and for data that are not a text.
    """
    decided = ("trainer.max_time", "trainer.val_check_interval", "callbacks.metrics", "ckpt_path", "hydra.")
    for word in overrides:
        if word.lstrip("+~").startswith(decided):
            raise UserError(f"{word}: bench equal-time decides this itself; say --seconds for the time.")
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    limit = f"trainer.max_time='{day:02}:{hour:02}:{minute:02}:{second:02}'"
    cfg = compose([*overrides, limit, "trainer.enable_progress_bar=false"])
    if cfg["data"].get("corpus") == "synthetic":
        raise UserError("bench equal-time needs a text; choose data=stdlib, text, code or jsonl.")
    return cfg


def steps_in(cfg: dict[str, Any], load: Load, seconds: float) -> int:
    """How many optimizer steps of ours fit the time: the rates of a run follow its number of steps, so that one which
    the clock cut short would never have lowered them. A few steps on random tokens are timed; at least 10 are said."""
    module = build(cfg)
    keep_trits(module, load.accumulate > 1)
    data = RandomTokens(load.config, load.batch, load.accumulate, module.device)
    optimizer = module.configure_optimizers()
    taken = []
    for _ in range(TRIAL_STEPS):
        start = time.perf_counter()
        bare_step(module, optimizer, data.batches)
        if module.device.type != "cpu":
            getattr(torch, module.device.type).synchronize()
        taken.append(time.perf_counter() - start)
    return max(10, int(seconds / statistics.median(taken[1:])))


def train_ours(cfg: dict[str, Any], load: Load) -> dict[str, Any]:
    """Our run: {steps, planned_steps, tokens, seconds, nats_per_token, bits_per_byte}."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place) / "run"
        metrics = train(Checked(copy.deepcopy(cfg), []), folder)
        with (folder / "metrics.csv").open(newline="") as file:
            speeds = [float(row["train/tokens_per_second"]) for row in csv.DictReader(file) if row["train/loss"]]
    return {
        "steps": len(speeds),
        "planned_steps": cfg["trainer"]["max_steps"],
        "tokens": load.tokens * len(speeds),
        "seconds": sum(load.tokens / speed for speed in speeds),
        "nats_per_token": metrics["val/loss"],
        "bits_per_byte": metrics["val/bpb"],
    }


def train_peer(one: Peer, compiled: bool, load: Load, data: DataModule, seconds: int) -> dict[str, Any]:
    """A peer in its fastest arithmetic: {arm, parameters, steps, tokens, seconds, nats_per_token, bits_per_byte}."""
    with open_arms([one], compiled, load) as (arms, _):
        best = _fastest(arms)
        for arm in arms:
            if arm is not best:
                arm.close()
        with tempfile.TemporaryDirectory() as place:
            held = Path(place) / "validation.npz"
            batches = list(data.val_dataloader())
            arrays = {name: np.concatenate([b[name].numpy() for b in batches]) for name in ("tokens", "targets")}
            np.savez(held, tokens=arrays["tokens"], targets=arrays["targets"])
            try:
                answer = best.ask(
                    "train",
                    file=str(Path(str(data.folder)) / "train.bin"),
                    token_dtype=data.header["dtype"],
                    seconds=seconds,
                    validation=str(held),
                )
            except ArmFailed as error:
                raise UserError(f"{one.option}: its training failed ({error}).") from error
        nats, size = answer.pop("nats"), data.val_bytes
        assert size is not None
        return {
            "arm": best.name,
            "parameters": best.parameters,
            **answer,
            "nats_per_token": nats / int((arrays["targets"] != IGNORED).sum()),
            "bits_per_byte": nats / math.log(2) / size,
        }


def _fastest(arms: Sequence[Arm]) -> Arm:
    if len(arms) == 1:
        return arms[0]
    taken = rounds({arm.name: arm.seconds for arm in arms}, repeats=2)
    return min(arms, key=lambda arm: statistics.median(taken[arm.name]))


def main(argv: list[str]) -> int:
    """Train both, validate and print; returns the exit code."""
    parser = Parser("bench equal-time", __doc__)
    add_peer_option(parser, needed=True)
    parser.add_argument("--seconds", type=count, default=200, help="of training for each (200)")
    parser.add_argument("--threads", type=count, default=1, help="threads of torch (1)")
    parser.add_argument("--compile", action="store_true", help="try the peers compiled, too")
    parser.add_argument(
        "overrides", nargs="*", help="configuration overrides of our run: data=text data.paths=[my.txt]"
    )
    options = parser.parse_intermixed_args(argv)
    torch.set_num_threads(options.threads)
    cfg = configure(options.overrides, options.seconds)
    settled = settle(copy.deepcopy(cfg))
    data = build_data(settled)
    data.setup("fit")
    fit_vocabulary(settled, data)
    config, device = model_config(settled), find_device(settled["trainer"]["accelerator"])
    load = current_load(config, data.batch_size, settled["trainer"]["accumulate_grad_batches"], device)
    if not any(word.startswith("trainer.max_steps=") for word in options.overrides):
        cfg["trainer"]["max_steps"] = steps_in(settled, load, options.seconds)
    cfg["trainer"]["val_check_interval"] = cfg["trainer"]["max_steps"]  # once, at the end
    peers = {one.name: train_peer(one, options.compile, load, data, options.seconds) for one in options.peer}
    module = build(settled)
    ours = {"arm": OURS, "parameters": sum(p.numel() for p in module.parameters()), **train_ours(cfg, load)}
    figures = {OURS: ours, **peers}
    if not options.json:
        show_figures(figures, data, options.seconds, options.threads)
    report({"seconds": options.seconds, "runs": figures}, options.json)
    return 0


def show_figures(figures: dict[str, dict[str, Any]], data: DataModule, seconds: int, threads: int) -> None:
    """Print the table."""
    rows = [
        [
            run["arm"],
            f"{run['parameters'] / 1e6:,.1f}M",
            f"{run['tokens']:,}",
            f"{run['tokens'] / run['seconds']:,.0f}",
            f"{run['nats_per_token']:.4f}",
            f"{run['bits_per_byte']:.4f}",
        ]
        for run in figures.values()
    ]
    ours = figures[OURS]
    notes = [f"Ours: {ours['steps']:,} of {ours['planned_steps']:,} planned steps. {data.describe()}."]
    title = f"After {seconds} s of training, {threads} thread(s)"
    show(title, ["arm", "parameters", "tokens", "tokens/s", "nats/token", "bits/byte"], rows, notes)
