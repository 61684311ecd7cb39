"""`nanochat bench collider`: what a training step saves when its backward runs on a part of the tokens."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from nanochat.bench.measure import Parser, clock, count, count_or_zero, one_of, report, shares, show
from nanochat.model import GPT, GPTConfig
from nanochat.model.rows import KeptRows
from nanochat.objectives import NextToken, Step
from nanochat.objectives.collider import TopTokens, kept_count

SHAPES = {
    "nano-125m": GPTConfig(
        vocab_size=50257, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, ffn_dim=2176, seq_len=512
    ),
    "d20": GPTConfig(vocab_size=50257, dim=256, n_layers=6, n_heads=4, n_kv_heads=4, ffn_dim=768, seq_len=256),
    "tiny": GPTConfig(vocab_size=4096, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=512, seq_len=256),
}
PARTS = ("forward", "backward", "optimizer")


class Bench:
    """One network and its optimizer, shared by all arms, so that they differ in nothing but the filter."""

    def __init__(self, config: GPTConfig, batch: int, device: str, autocast: bool) -> None:
        self.gpt = GPT(config, seed=0).to(device)
        self.objective = NextToken(config)
        self.optimizer = torch.optim.AdamW(self.gpt.parameters(), lr=1e-3, fused=True)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=autocast)
        generator = torch.Generator().manual_seed(0)
        shape = (batch, config.seq_len + 1)
        # a small alphabet in runs, so that there is something to learn
        text = torch.randint(config.vocab_size // 8, shape, generator=generator).cummax(1).values.to(device)
        self.tokens, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

    def step(self, sparsity: float | None) -> tuple[float, dict[str, float]]:
        """One step; None is the plain model. Returns the plain loss and the seconds of each part."""
        self.gpt.kept_rows = None if sparsity is None else KeptRows()
        self.objective.selector = None if sparsity is None else TopTokens(kept_count(self.tokens.shape[1], sparsity))
        start = clock()
        with self.autocast:
            step = Step(self.gpt, self.tokens, self.targets, self.gpt.hidden(self.tokens))
            loss = self.objective(step)
        forward = clock()
        loss.backward()
        backward = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = clock()
        seconds = dict(zip(PARTS, (forward - start, backward - forward, end - backward), strict=True))
        return step.metrics["train/loss"].item(), {**seconds, "step": end - start}


def arms(sparsities: list[float]) -> dict[str, float | None]:
    """The plain model, the compact path with all rows kept, and the filtered ones."""
    return {"plain": None, "all rows kept": 0.0} | {f"sparsity {s:g}": s for s in sparsities}


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parser = Parser("bench collider", __doc__, repeats=9)
    parser.add_argument("--shape", type=one_of(SHAPES), default="nano-125m", help=", ".join(SHAPES))
    parser.add_argument("--batch", type=count, default=1, help="sequences of a step (1)")
    parser.add_argument("--sparsity", type=shares, default=[0.4, 0.5], help="shares without a backward (0.4,0.5)")
    parser.add_argument("--learn", type=count_or_zero, default=0, metavar="STEPS", help="also train so long, filtered")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    cuda = torch.cuda.is_available()
    bench = Bench(SHAPES[options.shape], options.batch, "cuda" if cuda else "cpu", autocast=cuda)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in arms(options.sparsity)}
    for turn in range(options.repeats + 1):
        for name, sparsity in arms(options.sparsity).items():
            taken = bench.step(sparsity)[1]
            if turn:  # the first round warms up
                times[name].append(taken)
    median = {
        name: {part: statistics.median(t[part] for t in taken) for part in (*PARTS, "step")}
        for name, taken in times.items()
    }
    figures: dict[str, Any] = {
        "shape": options.shape,
        "tokens_per_step": bench.tokens.numel(),
        "repeats": options.repeats,
        "seconds": median,
    }
    rows = []
    for name, sparsity in arms(options.sparsity).items():
        backward, step = (median[name][part] / median["plain"][part] for part in ("backward", "step"))
        if sparsity is not None:
            figures |= {f"backward_ratio_{sparsity:g}": backward, f"step_ratio_{sparsity:g}": step}
        rows.append([name, *(median[name][part] for part in (*PARTS, "step")), backward, step])
    if options.learn:
        losses = [bench.step(options.sparsity[0])[0] for _ in range(options.learn)]
        figures["losses"] = [losses[0], losses[-1]]
    if not options.json:
        title = f"{options.shape}, {bench.tokens.numel():,} tokens a step, {options.threads} thread(s): seconds"
        notes = ["Forward includes the head's loss, the choice, and the head's gradient of the kept rows."]
        if options.learn:
            notes.append(f"Loss over {options.learn} filtered steps: {losses[0]:.3f} -> {losses[-1]:.3f}.")
        show(title, ["", *PARTS, "step", "backward / plain", "step / plain"], rows, notes)
    report(figures, options.json)
    return 0
