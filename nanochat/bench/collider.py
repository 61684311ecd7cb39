"""`nanochat bench collider`: what a training step saves when its backward runs on a part of the tokens."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from nanochat.bench.measure import Workplace, clock, network, paired_ratio, presets, report, rounds
from nanochat.console import Parser, count, count_or_zero, one_of, shares
from nanochat.model import GPT, GPTConfig
from nanochat.model.compact_backward import KeptRows
from nanochat.objectives import NextToken, Step
from nanochat.objectives.token_filter import TopTokens, kept_count
from nanochat.reports.table import show

PARTS = ("forward", "backward", "optimizer", "step")
PLAIN = "plain"


class Bench:
    """One network and its optimizer, shared by all arms, so that they differ in nothing but the filter."""

    def __init__(self, config: GPTConfig, batch: int) -> None:
        self.place = Workplace()
        self.gpt = GPT(config, seed=0).to(self.place.device)
        self.objective = NextToken(config)
        self.optimizer = torch.optim.AdamW(self.gpt.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        shape = (batch, config.seq_len + 1)
        # a small alphabet in runs, so that there is something to learn
        text = torch.randint(config.vocab_size // 8, shape, generator=generator).cummax(1).values
        text = text.to(self.place.device)
        self.tokens, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step(self, sparsity: float | None) -> tuple[float, dict[str, float]]:
        """One step; None is the plain model. Returns the plain loss and the seconds of each part."""
        self.gpt.kept_rows = None if sparsity is None else KeptRows()
        self.objective.selector = None if sparsity is None else TopTokens(kept_count(self.tokens.shape[1], sparsity))
        start = clock()
        with self.place.autocast():
            step = Step.of(self.gpt, self.tokens, self.targets)
            loss = self.objective(step)
        forward = clock()
        loss.backward()
        backward = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = clock()
        taken = (forward - start, backward - forward, end - backward, end - start)
        return step.metrics["train/loss"].item(), dict(zip(PARTS, taken, strict=True))


def measure(bench: Bench, sparsities: list[float], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each part in each arm: the plain model, the compact path with all rows kept, the filtered ones.

    `backward_ratio` and `step_ratio` are to the plain model in the same round.
    """
    arms = {PLAIN: None, "all rows kept": 0.0} | {f"sparsity {s:g}": s for s in sparsities}
    steps = {name: (lambda sparsity=sparsity: bench.step(sparsity)[1]) for name, sparsity in arms.items()}
    taken = rounds(steps, repeats, say=True)
    figures = {}
    for name, own in taken.items():
        figures[name] = {part: statistics.median(seconds[part] for seconds in own) for part in PARTS}
        for part in ("backward", "step"):
            pair = ([seconds[part] for seconds in arm] for arm in (own, taken[PLAIN]))
            figures[name][f"{part}_ratio"] = paired_ratio(*pair)
    return figures


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench collider", __doc__, repeats=9)
    parser.add_argument("--preset", type=one_of(presets()), default="nano-125m", help="the network (nano-125m)")
    parser.add_argument("--batch", type=count, default=1, help="sequences of a step (1)")
    parser.add_argument("--sparsity", type=shares, default=[0.4, 0.5], help="shares without a backward (0.4,0.5)")
    parser.add_argument("--learn", type=count_or_zero, default=0, metavar="STEPS", help="also train so long, filtered")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    bench = Bench(network(options.preset), options.batch)
    arms = measure(bench, options.sparsity, options.repeats)
    tokens = bench.tokens.numel()
    figures: dict[str, Any] = {"preset": options.preset, "tokens_per_step": tokens, "arms": arms}
    notes = ["Forward includes the head's loss, the choice, and the head's gradient of the kept rows."]
    if not options.json:
        title = f"{options.preset}, {tokens:,} tokens a step, {options.threads} thread(s): seconds"
        rows = [[name, *entry.values()] for name, entry in arms.items()]
        show(title, ["", *PARTS, "backward / plain", "step / plain"], rows, notes)
    if options.learn:
        losses = [bench.step(options.sparsity[0])[0] for _ in range(options.learn)]
        figures["losses"] = [losses[0], losses[-1]]
        if not options.json:
            print(f"Loss over {options.learn} steps at sparsity {options.sparsity[0]:g}: "
                  f"{losses[0]:.3f} -> {losses[-1]:.3f}.")  # fmt: skip
    report(figures, options.json)
    return 0
