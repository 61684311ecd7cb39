"""`nanochat bench equal-time`: what is a model worth after the same wall-clock time? Ours beside other projects'.

Ours is a run as a user starts it, with everything that a run does, whose schedule ends with the time
(`schedule.horizon=time`). A peer trains its own model of the same width, depth and heads with its own optimizer, in its
fastest arithmetic, on the same prepared tokens; its rates follow the time as well: they warm up, stay, and fall over
the last 40% of it. Both are validated on the same tokens afterwards, outside of the time.

What cannot be equal favours the peer. Our time includes the first step's warm-up and the run's saves, and its last step
ends before the time is up; a peer warms up before its time begins, saves nothing, and finishes the step that it is in.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from nanochat.bench.measure import report, rounds
from nanochat.bench.peers import OURS, Arm, ArmFailed, Load, Peer, add_peer_option, current_load, open_arms
from nanochat.bench.step import build
from nanochat.config.check import Checked
from nanochat.config.compose import compose
from nanochat.config.vocabulary import build_data, fit_vocabulary
from nanochat.console import Parser, count
from nanochat.data import DataModule
from nanochat.device import find_device
from nanochat.errors import UserError
from nanochat.objectives import IGNORED
from nanochat.reports.table import show
from nanochat.run import settle, train
from nanochat.training.module import model_config


def configure(overrides: Sequence[str], seconds: int) -> dict[str, Any]:
    """The configuration of our run: the default one with the overrides, and the time.

    Raises `UserError` for overrides of what the bench decides, and for data that are not a text.
    """
    decided = (
        *("trainer.max_time", "trainer.max_steps", "trainer.limit_val_batches", "schedule.horizon"),
        *("callbacks.metrics", "ckpt_path", "hydra."),
    )
    for word in overrides:
        if word.lstrip("+~").startswith(decided):
            raise UserError(f"{word}: bench equal-time decides this itself; say --seconds for the time.")
    length = [f"trainer.max_time={seconds}s", "trainer.max_steps=-1", "schedule.horizon=time"]
    cfg = compose([*overrides, *length, "trainer.limit_val_batches=0", "trainer.enable_progress_bar=false"])
    if cfg["data"].get("corpus") == "synthetic":
        raise UserError("bench equal-time needs a text; choose data=stdlib, text, code or jsonl.")
    return cfg


def train_ours(cfg: dict[str, Any], settled: dict[str, Any], load: Load, data: DataModule) -> dict[str, Any]:
    """Our run: {arm, parameters, steps, tokens, seconds, nats_per_token, bits_per_byte}.

    Args:
        cfg: the configuration; settled: the same one with every `auto` decided, to validate with.
    """
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        folder = Path(place) / "run"
        train(Checked(copy.deepcopy(cfg), []), folder)
        with (folder / "metrics.csv").open(newline="") as file:
            speeds = [float(row["train/tokens_per_second"]) for row in csv.DictReader(file) if row["train/loss"]]
        module = build(settled)
        options = {key: settled["trainer"][key] for key in ("accelerator", "precision")}
        trainer = Trainer(**options, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        last = folder / "checkpoints" / "last.ckpt"
        trainer.validate(module, datamodule=data, ckpt_path=last, weights_only=True, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "arm": OURS,
        "parameters": sum(p.numel() for p in module.parameters()),
        "steps": len(speeds),
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
    peers = {one.name: train_peer(one, options.compile, load, data, options.seconds) for one in options.peer}
    figures = {OURS: train_ours(cfg, settled, load, data), **peers}
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
    title = f"After {seconds} s of training, {threads} thread(s)"
    show(title, ["arm", "parameters", "tokens", "tokens/s", "nats/token", "bits/byte"], rows, [f"{data.describe()}."])
