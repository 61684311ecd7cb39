"""Bytes that ranks send in a step, and the scaling that a small model of compute and links expects, for each preset.

python experiments/2026-11-24-ranks/scaling.py > table.md

The model, nothing of which was measured on GPUs: a step computes 6 FLOPs per weight of a matrix and token (and
attention's) at 40% of an H100's dense bf16 peak, then sends every gradient and every weight once (float32) at the
link's speed, without overlap; each rank then has 1 / W of the optimizer's work, which is left out.
"""

from __future__ import annotations

import torch

from nanochat.config.compose import compose
from nanochat.config.schema import CONF
from nanochat.reports.header import tokens_per_step
from nanochat.training.callbacks.throughput import PEAK_FLOPS, flops_per_token
from nanochat.training.module import NanoChatModule

UTILISATION = 0.4
LINKS = {"NVLink": (8, 300e9), "PCIe 4 x16": (8, 20e9), "400 Gb/s between nodes of 8": (64, 40e9)}
"""name -> (ranks, bytes/s in each direction for one rank; between nodes for one node)"""

print("| preset | parameters | tokens a rank and step | bytes a rank sends, W ranks |", end="")
print("".join(f" {count} ranks, {name} |" for name, (count, _) in LINKS.items()))
print("|---" * (4 + len(LINKS)) + "|")
for path in sorted((CONF / "experiment").glob("*.yaml"), key=lambda path: path.stem):
    plain = compose([f"experiment={path.stem}", "model.vocab_size=4096"] if path.stem == "tiny" else
                    [f"experiment={path.stem}"])  # fmt: skip
    with torch.device("meta"):
        module = NanoChatModule(plain)
    parameters = sum(p.numel() for p in module.parameters())
    tokens = tokens_per_step(plain)
    compute = tokens * flops_per_token(module.gpt) / (UTILISATION * PEAK_FLOPS["H100"])
    payload = 8.0 * parameters  # a float32 gradient and a float32 weight
    cells = []
    for count, speed in LINKS.values():
        nodes = count // 8 if count > 8 else count
        cells.append(compute / (compute + payload * (nodes - 1) / nodes / speed))
    row = [path.stem, f"{parameters / 1e6:,.1f}M", f"{tokens:,}", f"{payload / 1e9:.2f} GB x (W - 1) / W"]
    print(f"| {' | '.join(row)} | {' | '.join(f'{cell:.0%}' for cell in cells)} |")
