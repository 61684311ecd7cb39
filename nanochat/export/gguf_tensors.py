"""Where every parameter of the network lies in a GGUF file, and in which form: for writing and for reading back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.packing import BLOCK
from nanochat.model.bitlinear import dequantise, ternarise
from nanochat.model.config import VALUE_GATE_CHANNELS, GPTConfig
from nanochat.model.value_embeddings import rounded_gain

OWN = "nanochat"
"""name of the architecture that holds whatever this network can be, without folding or permuting"""


@dataclass(frozen=True)
class Slot:
    """One parameter of a block, or a norm, and its tensor in the file."""

    name: str
    """in the file, without `.weight`"""
    source: str
    """in `GPT.state_dict()`"""
    shape: tuple[int, ...]
    """of the parameter"""
    stored: tuple[int, ...]
    """in the file: padded with zeros at the end"""
    matrix: bool
    """a ternary (or float) matrix of a block; otherwise float32"""
    permuted_heads: int = 0
    """heads whose rows are permuted; 0 = none"""
    scale: float = 1.0
    """the file holds the vector times this"""
    fill: float = 0.0
    """what a vector is padded with"""
    parts: int = 1
    """a matrix' columns are as many groups, each padded on its own"""
    gain: str = ""
    """a matrix of values: the parameter whose numbers, one a head, are the one-hot rows that read the lane"""
    lane_start: int = 0
    """the column of the first of these"""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file: `values` makes its float32 array when its turn comes."""

    name: str
    shape: tuple[int, ...]
    type: str
    values: Callable[[], np.ndarray]
    exact: bool


def padded_ffn(config: GPTConfig, kind: str) -> int:
    """The feed-forward width in the file: the next multiple of the type's block."""
    return -(-config.ffn_dim // BLOCK[kind]) * BLOCK[kind]


def shipped(weight: Tensor, config: GPTConfig) -> np.ndarray:
    """The float32 values that the forward pass multiplies by."""
    weight = weight.detach().cpu().float()
    if config.ternary:
        weight = dequantise(*ternarise(weight, config.weight_block, config.scale_format), config.weight_block)
    return weight.numpy()


def permute_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from the half-split pairing of RoPE to the neighbouring one, head by head."""
    rows = values.reshape(heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


def unpermute_heads(values: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute_heads`."""
    rows = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


def block_slots(
    config: GPTConfig, arch: str, kind: str, source: str, name: str, layer: int | None = None
) -> Iterator[Slot]:
    """The parameters of one transformer block.

    source, name: its prefixes, such as blocks.0 and blk.0; layer: its number, None for a block outside of the trunk.
    """
    d, f, ffn, wide = config.dim, config.ffn_dim, padded_ffn(config, kind), config.stream_width
    kv = config.n_kv_heads * config.head_dim
    permuted = arch == "llama"
    table = config.value_table(layer) if config.lane_width and layer is not None else None

    def vector(target: str, parameter: str, size: int, stored: int = 0, scale: float = 1.0, fill: float = 0.0) -> Slot:
        shapes = (size,), (stored or size,)
        return Slot(f"{name}.{target}", f"{source}.{parameter}.weight", *shapes, False, scale=scale, fill=fill)

    def matrix(target: str, parameter: str, shape: tuple[int, int], stored: tuple[int, int], heads: int = 0) -> Slot:
        return Slot(f"{name}.{target}", f"{source}.{parameter}.weight", shape, stored, True, heads if permuted else 0)

    # a lane of value embeddings widens the stream: only the values read it, and nothing writes to it
    yield vector("attn_norm", "attention.norm", d, wide, fill=0.0 if table is None else 1.0)
    yield matrix("attn_q", "attention.q", (d, d), (d, wide), config.n_heads)
    yield matrix("attn_k", "attention.k", (kv, d), (kv, wide), config.n_kv_heads)
    values = matrix("attn_v", "attention.v", (kv, d), (kv, wide))
    if table is not None:
        start = d + table * config.value_width
        values = replace(values, gain=f"{source}.attention.value.gain", lane_start=start)
    yield values
    yield matrix("attn_output", "attention.o", (d, d), (wide, d))
    if config.qk_norm:
        yield vector("attn_q_norm", "attention.q_norm", config.head_dim)
        yield vector("attn_k_norm", "attention.k_norm", config.head_dim)
    if config.sub_norm:
        yield vector("attn_sub_norm", "attention.sub_norm", d)
        # the mean square over a padded row is smaller by ffn_dim / ffn
        yield vector("ffn_sub_norm", "feedforward.sub_norm", f, ffn, (f / ffn) ** 0.5)
    yield vector("ffn_norm", "feedforward.norm", d, wide)
    # padding adds zero rows and columns: the gated unit gives zero there, and nothing reads it
    yield matrix("ffn_gate", "feedforward.gate", (f, d), (ffn, wide))
    yield matrix("ffn_up", "feedforward.up", (f, d), (ffn, wide))
    yield matrix("ffn_down", "feedforward.down", (d, f), (wide, ffn))


def hyper_slots(config: GPTConfig, layer: int) -> Iterator[Slot]:
    """The hyper-connections of one block."""
    n = config.streams
    orders = math.factorial(n)
    shapes: dict[str, tuple[int, ...]] = {"res": (orders,), "pre": (n,), "post": (n,)}
    if config.stream_maps == "dynamic":
        shapes |= {"phi": (orders + 2 * n, n * config.dim), "gate": (3,)}
    for sublayer in ("hyper_attention", "hyper_feedforward"):
        for parameter, shape in shapes.items():
            path = f"{layer}.{sublayer}.{parameter}"
            yield Slot(f"blk.{path}", f"blocks.{path}", shape, shape, False)


def mtp_slots(config: GPTConfig, arch: str, kind: str, head: int) -> Iterator[Slot]:
    """One sequential head of multi-token prediction: llama.cpp's `nextn` block, behind the network's own blocks."""
    d, wide, name, source = config.dim, config.stream_width, f"blk.{config.n_layers + head}", f"mtp.heads.{head}"
    plain = replace(config, streams=1)
    yield Slot(f"{name}.nextn.eh_proj", f"{source}.eh_proj.weight", (d, 2 * d), (wide, 2 * wide), True, parts=2)
    yield Slot(f"{name}.nextn.enorm", f"{source}.embedding_norm.weight", (d,), (wide,), False)
    yield Slot(f"{name}.nextn.hnorm", f"{source}.hidden_norm.weight", (d,), (wide,), False)
    yield Slot(f"{name}.nextn.shared_head_norm", f"{source}.norm.weight", (d,), (wide,), False)
    yield from block_slots(plain, arch, kind, f"{source}.block", name)


def mtp_heads(objectives: Mapping[str, Tensor]) -> int:
    """How many sequential heads the parameters of a run's objectives hold."""
    return sum(name.startswith("mtp.heads.") and name.endswith(".eh_proj.weight") for name in objectives)


def network_slots(config: GPTConfig, arch: str, kind: str, nextn: int = 0) -> Iterator[Slot]:
    """Every parameter but the embedding table and the output matrix."""
    if config.value_embeddings and not config.lane_width:  # gates of the input: for our own architecture alone
        shape = (config.vocab_size, config.value_embeddings * config.value_width)
        yield Slot("value_embd", "value_embedding.weight", shape, shape, False)
        shape = (config.value_width // config.head_dim, VALUE_GATE_CHANNELS)
        for layer in config.value_layers:
            source = f"blocks.{layer}.attention.value.gate.weight"
            yield Slot(f"blk.{layer}.attn_value_gate", source, shape, shape, False)
    yield Slot("output_norm", "norm.weight", (config.dim,), (config.stream_width,), False)
    for layer in range(config.n_layers):
        yield from block_slots(config, arch, kind, f"blocks.{layer}", f"blk.{layer}", layer)
        if config.streams > 1:
            yield from hyper_slots(config, layer)
    for head in range(nextn):
        yield from mtp_slots(config, arch, kind, head)


def pad(array: np.ndarray, slot: Slot) -> np.ndarray:
    """A parameter in the shape that the file stores."""
    if slot.parts > 1:
        parts = np.split(array, slot.parts, axis=-1)
        stored = (*slot.stored[:-1], slot.stored[-1] // slot.parts)
        return np.concatenate([pad(part, replace(slot, stored=stored, parts=1)) for part in parts], -1)
    room = [(0, size - now) for size, now in zip(slot.stored, array.shape, strict=True)]
    return np.pad(array, room, constant_values=slot.fill)


def cut(array: np.ndarray, slot: Slot) -> np.ndarray:
    """The inverse of `pad`."""
    if slot.parts > 1:
        shape = (*slot.shape[:-1], slot.shape[-1] // slot.parts)
        parts = np.split(array, slot.parts, axis=-1)
        return np.concatenate([cut(part, replace(slot, shape=shape, parts=1)) for part in parts], -1)
    return array[tuple(slice(size) for size in slot.shape)]


def slot_values(slot: Slot, config: GPTConfig, weights: Mapping[str, Tensor]) -> np.ndarray:
    """A parameter as the file holds it, float32."""
    if slot.matrix:
        array = shipped(weights[slot.source], config)
    else:
        array = weights[slot.source].detach().cpu().float().numpy() * np.float32(slot.scale)
    if slot.permuted_heads:
        array = permute_heads(array, slot.permuted_heads)
    array = pad(array, slot)
    if slot.gain:
        gains = rounded_gain(weights[slot.gain].detach().cpu().float()).numpy()
        rows = np.arange(len(gains) * config.head_dim)
        array[rows, slot.lane_start + rows] = gains.repeat(config.head_dim)
    return array


def plan_slot(slot: Slot, config: GPTConfig, weights: Mapping[str, Tensor], kind: str) -> TensorPlan:
    """How the tensor of a slot is made."""
    kind, exact = (kind, config.ternary) if slot.matrix else ("f32", False)
    return TensorPlan(f"{slot.name}.weight", slot.stored, kind, lambda: slot_values(slot, config, weights), exact)


def folds_embedding(config: GPTConfig, arch: str) -> bool:
    """Whether the norm after the embedding becomes part of the table."""
    return config.embedding_norm and arch != OWN


def has_output(config: GPTConfig, arch: str) -> bool:
    """Whether the file has an output matrix of its own: a tied table that is folded cannot be the output, too."""
    return folds_embedding(config, arch) or not config.tied


def has_heads(arch: str) -> bool:
    """Whether the architecture has a place for sequential heads of multi-token prediction."""
    return arch in (OWN, "hy_v3")


def embedding_rows(config: GPTConfig, weights: Mapping[str, Tensor], fold: bool) -> Tensor:
    """The token table of the file, (vocab_size, stream_width) float32: the embedding, and its lane beside it.

    fold: divide every row of the embedding by its root mean square, as the norm after it does.
    """
    rows = weights["embedding.weight"].detach().cpu().float()
    if fold:
        rows = torch.nn.functional.rms_norm(rows, (config.dim,), eps=config.norm_eps)
    if config.lane_width:
        rows = torch.cat((rows, weights["value_embedding.weight"].detach().cpu().float()), 1)
    return rows


def output_rows(config: GPTConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """The output matrix of the file, (vocab_size, stream_width) float32; it does not read the lane."""
    rows = weights.get("head.weight", weights["embedding.weight"]).detach().cpu().float()
    return torch.nn.functional.pad(rows, (0, config.lane_width))


def plan_tensors(
    config: GPTConfig, weights: Mapping[str, Tensor], arch: str, kind: str, embedding_type: str, nextn: int = 0
) -> list[TensorPlan]:
    """Every tensor of the file, in order. `weights` is `GPT.state_dict()`, with those of the `nextn` sequential heads
    of multi-token prediction under `mtp.heads.`.
    """
    fold = folds_embedding(config, arch)

    def embedding() -> np.ndarray:
        return embedding_rows(config, weights, fold).numpy()

    def head() -> np.ndarray:
        return output_rows(config, weights).numpy()

    shape = (config.vocab_size, config.stream_width)
    plans = [TensorPlan("token_embd.weight", shape, embedding_type, embedding, False)]
    if has_output(config, arch):
        plans.append(TensorPlan("output.weight", shape, embedding_type, head, False))
    plans += [plan_slot(slot, config, weights, kind) for slot in network_slots(config, arch, kind, nextn)]
    return plans


def split_rows(config: GPTConfig, table: Tensor) -> dict[str, Tensor]:
    """The inverse of `embedding_rows`: a file's token table (vocab_size, stream_width) as parameters."""
    weights = {"embedding.weight": table[:, : config.dim].clone()}
    if config.lane_width:
        weights["value_embedding.weight"] = table[:, config.dim :].clone()
    return weights


def split_slot(slot: Slot, config: GPTConfig, array: np.ndarray) -> dict[str, Tensor]:
    """The inverse of `slot_values`: the parameters that a tensor of the file holds, without padding, in this network's
    order of rows."""
    found = {}
    if slot.gain:
        first = np.arange(0, config.value_width, config.head_dim)
        found[slot.gain] = torch.from_numpy(array[first, slot.lane_start + first].astype(np.float32))
    array = cut(array, slot)
    if slot.permuted_heads:
        array = unpermute_heads(array, slot.permuted_heads)
    if slot.scale != 1:
        array = array / np.float32(slot.scale)
    return {slot.source: torch.from_numpy(np.array(array, dtype=np.float32, order="C")), **found}


def read_tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a known shape, in float32; raises `UserError` when it is missing or has another shape."""
    if name in file.tensors and file.tensors[name].shape != shape:
        found = list(file.tensors[name].shape)
        raise UserError(f"{file.path}: tensor {name!r} has the shape {found} instead of {list(shape)}.")
    return file.array(name)


def read_network(
    file: GGUFFile, config: GPTConfig, arch: str, kind: str, nextn: int = 0
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The network in a file: its configuration as it is now (an embedding norm may be folded, the output matrix may
    have become its own) and its parameters, matrices de-quantised.

    config: of the network that was exported. Raises `UserError` when a tensor is missing or has another shape.
    """
    shape = (config.vocab_size, config.stream_width)
    weights = split_rows(config, torch.from_numpy(read_tensor(file, "token_embd.weight", shape)))
    if has_output(config, arch):
        weights["head.weight"] = torch.from_numpy(read_tensor(file, "output.weight", shape)[:, : config.dim].copy())
    for slot in network_slots(config, arch, kind, nextn):
        weights |= split_slot(slot, config, read_tensor(file, f"{slot.name}.weight", slot.stored))
    if folds_embedding(config, arch):
        config = replace(config, embedding_norm=False)
    return replace(config, tied="head.weight" not in weights), weights
