"""`nanochat bench mtp`: what multi-token prediction adds to a training step, in time and peak memory."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from nanochat.bench.measure import (
    Workplace,
    clock,
    in_child,
    measures_memory,
    network,
    paired_ratio,
    peak_extra_bytes,
    presets,
    report,
    rounds,
)
from nanochat.console import Parser, count, one_of, some_of
from nanochat.model import GPT, GPTConfig
from nanochat.objectives import NextToken, Step
from nanochat.objectives.mtp import MultiTokenPrediction
from nanochat.reports.table import show

# name: (kind, further tokens, fraction; None is the default)
ARMS: dict[str, tuple[str, int, float | None]] = {
    "sequential": ("sequential", 1, None),
    "sequential-3": ("sequential", 3, None),
    "sequential-full": ("sequential", 1, 1.0),
    "parallel-3": ("parallel", 3, None),
    "parallel-3-full": ("parallel", 3, 1.0),
    "weights-only-3": ("weights-only", 3, None),
}
OFF = "off"


class Bench:
    """One network and its optimizer for all arms; each arm brings its heads and their optimizer."""

    def __init__(self, config: GPTConfig, batch: int, names: list[str]) -> None:
        self.place = Workplace()
        self.gpt = GPT(config, seed=0).to(self.place.device)
        self.optimizer = torch.optim.AdamW(self.gpt.parameters(), lr=1e-3, fused=True)
        self.main = NextToken(config)
        self.arms: dict[str, tuple[list[torch.nn.Module], list[torch.optim.Optimizer]]] = {
            OFF: ([self.main], [self.optimizer])
        }
        for name in names:
            kind, tokens, fraction = ARMS[name]
            # the schedule must not have faded where the step is measured
            mtp = MultiTokenPrediction(config, kind=kind, tokens=tokens, token_fraction=fraction, schedule="constant")
            heads = list(mtp.to(self.place.device).parameters())
            own = [torch.optim.AdamW(heads, lr=1e-3, fused=True)] if heads else []
            self.arms[name] = ([self.main, mtp], [self.optimizer, *own])
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(1, config.vocab_size, (batch, config.seq_len + 1), generator=generator)
        text = text.to(self.place.device)
        self.tokens, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.count = 0

    def step(self, name: str) -> float:
        """Seconds of one step of an arm."""
        objectives, optimizers = self.arms[name]
        self.count += 1
        start = clock()
        with self.place.autocast():
            step = Step.of(self.gpt, self.tokens, self.targets, eot_id=0, micro_step=self.count)
            loss = torch.stack([objective(step) for objective in objectives]).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return clock() - start


def _peak(config: GPTConfig, batch: int, name: str) -> int:
    """Most bytes that training needs: weights, optimizer states, gradients and activations."""

    def two_steps() -> None:
        bench = Bench(config, batch, [] if name == OFF else [name])
        bench.step(name)  # the optimizer makes its states
        bench.step(name)

    torch.ones(1, device=Workplace().device)
    return peak_extra_bytes(two_steps)


def measure(config: GPTConfig, batch: int, names: list[str], repeats: int, memory: bool) -> dict[str, dict[str, Any]]:
    """Seconds of a step of each arm and of the plain model, their ratio, and the peaks of memory."""
    figures = _times(Bench(config, batch, names), repeats)  # whose memory is free again before the peaks are measured
    if memory:
        for name, entry in figures.items():
            entry["peak_mb"] = in_child(_peak, config, batch, name) / 1e6
            entry["peak_ratio"] = entry["peak_mb"] / figures[OFF]["peak_mb"]
    return figures


def _times(bench: Bench, repeats: int) -> dict[str, dict[str, Any]]:
    times = rounds({name: partial(bench.step, name) for name in bench.arms}, repeats, say=True)
    figures: dict[str, dict[str, Any]] = {}
    for name, taken in times.items():
        figures[name] = {"seconds": statistics.median(taken), "step_ratio": paired_ratio(taken, times[OFF])}
        if name != OFF:
            figures[name]["fraction"] = bench.arms[name][0][-1].fraction
    return figures


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench mtp", __doc__, repeats=5)
    parser.add_argument("--preset", type=one_of(presets()), default="nano-125m", help="the network (nano-125m)")
    parser.add_argument("--arms", type=some_of(ARMS), default=list(ARMS), help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--batch", type=count, default=4, help="sequences of a micro-batch (4)")
    parser.add_argument("--seq-len", type=count, help="tokens of a sequence (the preset's)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = network(options.preset, **({"seq_len": options.seq_len} if options.seq_len else {}))
    memory = measures_memory() and not options.no_memory
    figures = measure(config, options.batch, options.arms, options.repeats, memory)
    tokens = options.batch * config.seq_len
    if not options.json:
        columns = ["fraction", "seconds", "step_ratio", *(["peak_mb", "peak_ratio"] if memory else [])]
        rows = [[name, *(entry.get(column, "") for column in columns)] for name, entry in figures.items()]
        titles = ["", "fraction", "seconds", "step / off", *(["peak MB", "peak / off"] if memory else [])]
        notes = [
            "NAME-3: of three further tokens, else of one. full: at every position, not at a fraction.",
            "Step: with AdamW, one micro-batch. Peak: weights, optimizer states, gradients and activations.",
        ]
        title = f"{options.preset}, {tokens:,} tokens a step, {options.threads} thread(s)"
        show(title, titles, rows, notes if memory else notes[:1])
    report({"preset": options.preset, "tokens_per_step": tokens, "arms": figures}, options.json)
    return 0
