"""`nanochat bench mtp`: what multi-token prediction adds to a training step, in time and peak memory."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from nanochat.bench.collider import SHAPES
from nanochat.bench.measure import Parser, clock, count, in_child, one_of, peak_extra_bytes, report, show
from nanochat.model import GPT, GPTConfig
from nanochat.objectives import NextToken, Step
from nanochat.objectives.mtp import MultiTokenPrediction

# name: (kind, further tokens, fraction; None is the default)
ARMS: dict[str, tuple[str, int, float | None]] = {
    "sequential, 1 token": ("sequential", 1, None),
    "parallel, 3 tokens": ("parallel", 3, None),
    "weights-only, 3 tokens": ("weights-only", 3, None),
    "sequential, 3 tokens": ("sequential", 3, None),
    "sequential, 1 token, everywhere": ("sequential", 1, 1.0),
    "parallel, 3 tokens, everywhere": ("parallel", 3, 1.0),
}


class Bench:
    """One network and its optimizer for all arms; each arm brings its heads and their optimizer."""

    def __init__(self, config: GPTConfig, batch: int, names: list[str], device: str, autocast: bool) -> None:
        self.gpt = GPT(config, seed=0).to(device)
        self.optimizer = torch.optim.AdamW(self.gpt.parameters(), lr=1e-3, fused=True)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=autocast)
        self.main = NextToken(config)
        self.arms: dict[str, tuple[list[torch.nn.Module], list[torch.optim.Optimizer]]] = {
            "off": ([self.main], [self.optimizer])
        }
        for name in names:
            kind, tokens, fraction = ARMS[name]
            # the schedule must not have faded where the step is measured
            mtp = MultiTokenPrediction(
                config, kind=kind, tokens=tokens, token_fraction=fraction, schedule="constant"
            ).to(device)
            heads = list(mtp.parameters())
            own = [torch.optim.AdamW(heads, lr=1e-3, fused=True)] if heads else []
            self.arms[name] = ([self.main, mtp], [self.optimizer, *own])
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(1, config.vocab_size, (batch, config.seq_len + 1), generator=generator).to(device)
        self.tokens, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.count = 0

    def step(self, name: str) -> float:
        """Seconds of one step of an arm."""
        objectives, optimizers = self.arms[name]
        self.count += 1
        start = clock()
        with self.autocast:
            step = Step(
                self.gpt, self.tokens, self.targets, self.gpt.hidden(self.tokens), eot_id=0, micro_step=self.count
            )
            loss = torch.stack([objective(step) for objective in objectives]).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return clock() - start


def _peak(config: GPTConfig, batch: int, name: str) -> int:
    """Most bytes that training needs: weights, optimizer states, gradients and activations."""
    cuda = torch.cuda.is_available()

    def two_steps() -> None:
        bench = Bench(config, batch, [] if name == "off" else [name], "cuda" if cuda else "cpu", autocast=cuda)
        bench.step(name)  # the optimizer makes its states
        bench.step(name)

    torch.ones(1, device="cuda" if cuda else "cpu")
    return peak_extra_bytes(two_steps)


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench mtp", __doc__, repeats=5)
    parser.add_argument("--shape", type=one_of(SHAPES), default="nano-125m", help=", ".join(SHAPES))
    parser.add_argument("--batch", type=count, default=4, help="sequences of a micro-batch (4)")
    parser.add_argument("--seq-len", type=count, help="tokens of a sequence (the shape's)")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = SHAPES[options.shape]
    config = replace(config, seq_len=options.seq_len or config.seq_len)
    cuda = torch.cuda.is_available()
    bench = Bench(config, options.batch, list(ARMS), "cuda" if cuda else "cpu", autocast=cuda)
    times: dict[str, list[float]] = {name: [] for name in bench.arms}
    for turn in range(options.repeats + 1):
        for name in bench.arms:
            taken = bench.step(name)
            if turn:  # the first round warms up
                times[name].append(taken)
    tokens = bench.tokens.numel()
    fractions = {name: arm[0][-1].fraction for name, arm in bench.arms.items() if name != "off"}
    del bench
    figures: dict[str, Any] = {
        "shape": options.shape,
        "tokens_per_step": tokens,
        "repeats": options.repeats,
        "arms": {},
    }
    base = statistics.median(times["off"])
    base_peak = None if options.no_memory else in_child(_peak, config, options.batch, "off")
    rows = [["off", "", base, 1.0, "" if base_peak is None else base_peak / 1e6, ""]]
    for name, fraction in fractions.items():
        seconds = statistics.median(times[name])
        entry = {"seconds": seconds, "step_ratio": seconds / base, "fraction": fraction}
        row = [name, fraction, seconds, seconds / base, "", ""]
        if base_peak is not None and "everywhere" not in name:
            peak = in_child(_peak, config, options.batch, name)
            entry |= {"peak_mb": peak / 1e6, "peak_ratio": peak / base_peak}
            row[4:] = [peak / 1e6, peak / base_peak]
        figures["arms"][name] = entry
        rows.append(row)
    figures["sequential_step_ratio"] = figures["arms"]["sequential, 1 token"]["step_ratio"]
    figures["parallel_step_ratio"] = figures["arms"]["parallel, 3 tokens"]["step_ratio"]
    if not options.json:
        title = f"{options.shape}, {tokens:,} tokens a step, {options.threads} thread(s)"
        columns = ["", "fraction", "seconds", "step / off", "peak MB", "peak / off"]
        show(title, columns, rows, ["Step: with AdamW. Peak: weights, optimizer states, gradients and activations."])
    report(figures, options.json)
    return 0
