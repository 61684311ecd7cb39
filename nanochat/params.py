"""`nanochat params model=d20`: where the parameters are, and what they cost in a file and in training."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.config.compose import compose
from nanochat.config.vocabulary import plan_vocabulary
from nanochat.console import Parser
from nanochat.device import find_device
from nanochat.environment import rank_count
from nanochat.export.gguf_tensors import mtp_heads
from nanochat.export.sizes import part_of, planned_file
from nanochat.optim import Optimizer
from nanochat.reports.table import Table
from nanochat.run import settle
from nanochat.training.memory import Memory, predict
from nanochat.training.module import NanoChatModule, build_optimizer


@dataclass
class Part:
    """What the parameters of one row of the table come to."""

    parameters: int = 0
    weight_bytes: int = 0
    optimizer_bytes: int = 0
    file_bytes: int = 0


def planned_optimizer(cfg: dict[str, Any], module: NanoChatModule) -> Optimizer:
    """The optimizer of a run over the module's parameters, without their memory.

    Each parameter is one element, on the device of the run and seen in the parameter's shape: the optimizer chooses its
    kernels by the device, as in a run.
    """
    device = find_device(cfg["trainer"]["accelerator"])
    named = [
        (name, torch.empty((), dtype=p.dtype, device=device).expand(p.shape).requires_grad_())
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    return build_optimizer(cfg, named)


def count(cfg: dict[str, Any]) -> tuple[dict[str, Part], str]:
    """Row of the table -> what it costs; and the type of the file's matrices.

    Nothing is allocated: the network, its objectives' heads and the optimizer's state tensors are all made on the meta
    device, the latter by the rules that make them in a run, and counted as `optim/bytes` counts them. No shape is
    multiplied, no size computed by a formula.

    Args:
        cfg: a settled configuration whose vocabulary is a number.
    """
    with torch.device("meta"):
        module = NanoChatModule(cfg)
    parts: dict[str, Part] = defaultdict(Part)
    planned = planned_optimizer(cfg, module).planned_bytes()
    for name, parameter in module.named_parameters():
        part = parts[part_of(name)]
        part.parameters += parameter.numel()
        part.weight_bytes += parameter.numel() * parameter.element_size()
        part.optimizer_bytes += planned.get(name, 0)
    kind, sizes = planned_file(module.gpt.config, mtp_heads(module.objectives.state_dict()))
    for name, size in sizes.items():  # a file may have an output matrix where the network has its table alone
        parts[name].file_bytes = size
    return dict(parts), kind


def table(title: str, parts: dict[str, Part], total: Part, kind: str) -> Table:
    """A row for each part, and their sum."""
    rows = []
    for name, part in (*parts.items(), ("all", total)):
        share = f"{100 * part.parameters / total.parameters:.1f}%"
        sizes = (part.weight_bytes, part.optimizer_bytes, part.file_bytes)
        rows.append([name, f"{part.parameters:,}", share, *(f"{size / 1e6:,.1f}" for size in sizes)])
    headings = ["part", "parameters", "share", "weights MB", "optimizer MB", f"GGUF MB ({kind.upper()})"]
    return Table(title, headings, rows)


def memory_table(cfg: dict[str, Any], memory: Memory) -> Table:
    """What training takes at its peak, by part."""
    data, trainer = cfg["data"], cfg["trainer"]
    title = (
        f"Training at its peak ({memory.moment}): {data['batch_size']} x {data['seq_len']:,} tokens, "
        f"{trainer['precision']}, on {trainer['accelerator']}"
    )
    if trainer.get("strategy") == "fsdp2" and (count := rank_count(cfg)) > 1:
        title += f", each of {count} ranks"
    rows = [[name, f"{size / 2**20:,.0f}"] for name, size in (*memory.parts.items(), ("all", memory.peak))]
    if memory.offloaded:
        rows.append(["beside it, in the CPU's memory", f"{memory.offloaded / 2**20:,.0f}"])
    note = (
        "Counted by rehearsing a step on tensors without memory; Python and torch take about half a GB more. Less: "
        "activation_checkpointing=block, a smaller data.batch_size with more trainer.accumulate_grad_batches, an 8-bit "
        "optimizer."
    )
    return Table(title, ["part", "MiB"], rows, [note])


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    parser = Parser("params", __doc__)
    parser.add_argument("overrides", nargs="*", help="as for training, such as model=d20 optim=muon8bit +mtp=on")
    options = parser.parse_intermixed_args(argv)
    cfg = plan_vocabulary(settle(compose(options.overrides)))
    parts, kind = count(cfg)
    total = Part(
        sum(part.parameters for part in parts.values()),
        sum(part.weight_bytes for part in parts.values()),
        sum(part.optimizer_bytes for part in parts.values()),
        sum(part.file_bytes for part in parts.values()),
    )
    memory = predict(cfg)
    if options.json:
        figures = {
            "parameters": total.parameters,
            "parts": {name: part.parameters for name, part in parts.items() if part.parameters},
            "optimizer_bytes": total.optimizer_bytes,
            "optimizer_parts": {name: part.optimizer_bytes for name, part in parts.items() if part.parameters},
            "training_bytes": 2 * total.weight_bytes + total.optimizer_bytes,
            "file_bytes": total.file_bytes,
            "file_type": kind,
            "file_parts": {name: part.file_bytes for name, part in parts.items()},
            "memory": {
                "peak": memory.peak,
                "moment": memory.moment,
                "parts": memory.parts,
                "offloaded": memory.offloaded,
            },
        }
        print(json.dumps(figures))
        return 0
    model = cfg["model"]
    title = f"{model['n_layers']} layers of width {model['dim']}, a vocabulary of {model['vocab_size']:,}"
    table(title, parts, total, kind).show()
    memory_table(cfg, memory).show()
    return 0
