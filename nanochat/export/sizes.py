"""What the parameters of a model come to in a GGUF file, before there is one."""

from __future__ import annotations

from collections import defaultdict

from nanochat.errors import UserError
from nanochat.export.gguf import architecture, default_embedding_type, default_type
from nanochat.export.gguf_tensors import OWN, has_heads, has_output, network_slots
from nanochat.export.packing import packed_bytes
from nanochat.model.config import GPTConfig


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


def planned_file(config: GPTConfig, heads: int = 0) -> tuple[str, dict[str, int]]:
    """The file that `nanochat export` writes unless it is told otherwise: (type of its matrices, bytes by part).

    Bytes are those of the tensors. Zeros count with the part that they pad: in the stream of the file a lane of value
    embeddings lies beside the network's own. A network that stock llama.cpp cannot run counts as for `--to nanochat`.

    Args:
        config: of the network.
        heads: sequential heads of multi-token prediction, which count where the file has a place for them.
    """
    try:
        arch = architecture(config, heads)
    except UserError:
        arch = OWN
    kind = default_type(config)
    table = default_embedding_type(kind)
    parts: dict[str, int] = defaultdict(int)
    parts["embedding"] = packed_bytes((config.vocab_size, config.dim), table)
    if config.lane_width:
        parts["value embeddings"] = packed_bytes((config.vocab_size, config.lane_width), table)
    if has_output(config, arch):
        parts["head"] = packed_bytes((config.vocab_size, config.stream_width), table)
    for slot in network_slots(config, arch, kind, heads if has_heads(arch) else 0):
        part = part_of(f"objectives.{slot.source}" if slot.source.startswith("mtp.") else f"gpt.{slot.source}")
        parts[part] += packed_bytes(slot.stored, kind if slot.matrix else "f32")
    return kind, dict(parts)
