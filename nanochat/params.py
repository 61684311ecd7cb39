"""`nanochat params model=d20`: where the parameters are, and what they cost in training and in a file."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

import torch
from hydra.utils import instantiate

from nanochat.bench.measure import show
from nanochat.config import compose
from nanochat.lightning.module import model_config
from nanochat.model import GPT, GPTConfig

TQ2_0_BITS = 2.0625  # two bits a weight and a float16 scale for 256
EMBEDDING_BITS = 8.5  # Q8_0


def part_of(name: str) -> str:
    """The row of the table that a parameter belongs to."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("head."):
        return "head"
    if name.endswith("norm.weight"):
        return "norms"
    if ".attention." in name:
        return "attention"
    if ".feedforward." in name:
        return "feed-forward"
    return "other"


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, counted without allocating the model."""
    with torch.device("meta"):
        model = GPT(config)
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return dict(counts)


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nanochat params", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", help="as for training, such as model=d20 model.tied=false")
    options = parser.parse_args(argv)
    cfg = compose(options.overrides)
    if cfg["model"]["vocab_size"] == "auto":
        cfg["model"]["vocab_size"] = instantiate(cfg["tokenizer"]).vocab_size
    config = model_config(cfg)
    counts = count_parameters(config)
    total = sum(counts.values())
    rows: list[list[Any]] = []
    shipped = 0.0
    for part, count in counts.items():
        matrices = part in ("attention", "feed-forward") and config.ternary
        bits = TQ2_0_BITS if matrices else 32 if part == "norms" else EMBEDDING_BITS
        shipped += count * bits / 8
        rows.append(
            [part, f"{count:,}", f"{100 * count / total:.1f}%", f"{4 * count / 1e6:,.1f}", f"{count * bits / 8e6:,.1f}"]
        )
    rows.append(["all", f"{total:,}", "100%", f"{4 * total / 1e6:,.1f}", f"{shipped / 1e6:,.1f}"])
    if options.json:
        print(json.dumps({"parameters": total, "parts": counts, "training_bytes": 8 * total, "file_bytes": shipped}))
        return 0
    note = "Training also holds the gradients (as large as the weights), the optimizer's state and activations."
    columns = ["part", "parameters", "share", "float32 MB", "GGUF MB (TQ2_0, Q8_0)"]
    show(f"{config.n_layers} layers of width {config.dim}", columns, rows, [note])
    return 0
