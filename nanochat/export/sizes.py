"""What the parameters of a model come to in a GGUF file, before there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.model import GPT, GPTConfig

TQ2_0_BITS = 2.0625  # two bits a weight and a float16 scale for 256
EMBEDDING_BITS = 8.5  # Q8_0


def part_of(name: str) -> str:
    """The part of the model that a parameter of the LightningModule belongs to."""
    if name.startswith("objectives."):
        return f"{name.split('.')[1]} heads"
    if name.startswith("gpt.embedding."):
        return "embedding"
    if name.startswith("gpt.value_embedding.") or ".attention.value." in name:
        return "value embeddings"
    if name.startswith("gpt.head."):
        return "head"
    if "hyper_" in name:
        return "hyper-connections"
    if name.endswith("norm.weight"):
        return "norms"
    if ".attention." in name:
        return "attention"
    if ".feedforward." in name:
        return "feed-forward"
    return "other"


def file_bits(name: str, parameter: Tensor, ternary: bool, heads: bool) -> float:
    """Bits of each element in a GGUF file of type tq2_0 (q8_0 for a float model's matrices).

    heads: those of multi-token prediction go into the file.
    """
    part = part_of(name)
    if part.endswith(" heads") and not heads:
        return 0.0
    if parameter.ndim != 2 or part == "hyper-connections":
        return 32.0
    return TQ2_0_BITS if ternary and part not in ("embedding", "head", "value embeddings") else EMBEDDING_BITS


def planned_file_bytes(config: GPTConfig) -> float:
    """Bytes of the weights of a network in a GGUF file of type tq2_0; heads of multi-token prediction are left out."""
    with torch.device("meta"):
        gpt = GPT(config)
    bits = (p.numel() * file_bits(f"gpt.{name}", p, config.ternary, False) for name, p in gpt.named_parameters())
    return sum(bits) / 8
