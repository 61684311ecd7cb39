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
from nanochat.model.config import GPTConfig

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
    heads: int = 0
    """heads whose rows are permuted; 0 = none"""
    scale: float = 1.0
    """the file holds the vector times this"""


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


def block_slots(config: GPTConfig, arch: str, kind: str, source: str, name: str) -> Iterator[Slot]:
    """The parameters of one transformer block. `source` and `name` are its prefixes, such as blocks.0 and blk.0."""
    d, f, ffn = config.dim, config.ffn_dim, padded_ffn(config, kind)
    kv = config.n_kv_heads * config.head_dim
    permuted = arch == "llama"

    def vector(target: str, parameter: str, size: int, stored: int = 0, scale: float = 1.0) -> Slot:
        stored = stored or size
        return Slot(f"{name}.{target}", f"{source}.{parameter}.weight", (size,), (stored,), False, scale=scale)

    def matrix(target: str, parameter: str, shape: tuple[int, int], stored: tuple[int, int], heads: int = 0) -> Slot:
        return Slot(f"{name}.{target}", f"{source}.{parameter}.weight", shape, stored, True, heads if permuted else 0)

    yield vector("attn_norm", "attention.norm", d)
    yield matrix("attn_q", "attention.q", (d, d), (d, d), config.n_heads)
    yield matrix("attn_k", "attention.k", (kv, d), (kv, d), config.n_kv_heads)
    yield matrix("attn_v", "attention.v", (kv, d), (kv, d))
    yield matrix("attn_output", "attention.o", (d, d), (d, d))
    if config.qk_norm:
        yield vector("attn_q_norm", "attention.q_norm", config.head_dim)
        yield vector("attn_k_norm", "attention.k_norm", config.head_dim)
    if config.sub_norm:
        yield vector("attn_sub_norm", "attention.sub_norm", d)
        # the mean square over a padded row is smaller by ffn_dim / ffn
        yield vector("ffn_sub_norm", "feedforward.sub_norm", f, ffn, (f / ffn) ** 0.5)
    yield vector("ffn_norm", "feedforward.norm", d)
    # padding adds zero rows and columns: the gated unit gives zero there, and nothing reads it
    yield matrix("ffn_gate", "feedforward.gate", (f, d), (ffn, d))
    yield matrix("ffn_up", "feedforward.up", (f, d), (ffn, d))
    yield matrix("ffn_down", "feedforward.down", (d, f), (d, ffn))


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
    d, name, source = config.dim, f"blk.{config.n_layers + head}", f"mtp.heads.{head}"
    plain = replace(config, streams=1)
    yield Slot(f"{name}.nextn.eh_proj", f"{source}.eh_proj.weight", (d, 2 * d), (d, 2 * d), True)
    yield Slot(f"{name}.nextn.enorm", f"{source}.embedding_norm.weight", (d,), (d,), False)
    yield Slot(f"{name}.nextn.hnorm", f"{source}.hidden_norm.weight", (d,), (d,), False)
    yield Slot(f"{name}.nextn.shared_head_norm", f"{source}.norm.weight", (d,), (d,), False)
    yield from block_slots(plain, arch, kind, f"{source}.block", name)


def mtp_heads(objectives: Mapping[str, Tensor]) -> int:
    """How many sequential heads the parameters of a run's objectives hold."""
    return sum(name.startswith("mtp.heads.") and name.endswith(".eh_proj.weight") for name in objectives)


def network_slots(config: GPTConfig, arch: str, kind: str, heads: int = 0) -> Iterator[Slot]:
    """Every parameter but the embedding table and the output matrix."""
    yield Slot("output_norm", "norm.weight", (config.dim,), (config.dim,), False)
    for layer in range(config.n_layers):
        yield from block_slots(config, arch, kind, f"blocks.{layer}", f"blk.{layer}")
        if config.streams > 1:
            yield from hyper_slots(config, layer)
    for head in range(heads):
        yield from mtp_slots(config, arch, kind, head)


def plan_slot(slot: Slot, config: GPTConfig, weights: Mapping[str, Tensor], kind: str) -> TensorPlan:
    """How the tensor of a slot is made."""

    def values() -> np.ndarray:
        if slot.matrix:
            array = shipped(weights[slot.source], config)
        else:
            array = weights[slot.source].detach().cpu().float().numpy() * np.float32(slot.scale)
        if slot.heads:
            array = permute_heads(array, slot.heads)
        return np.pad(array, [(0, size - now) for size, now in zip(slot.stored, array.shape, strict=True)])

    return TensorPlan(
        f"{slot.name}.weight", slot.stored, kind if slot.matrix else "f32", values, slot.matrix and config.ternary
    )


def folds_embedding(config: GPTConfig, arch: str) -> bool:
    """Whether the norm after the embedding becomes part of the table."""
    return config.embedding_norm and arch != OWN


def plan_tensors(
    config: GPTConfig, weights: Mapping[str, Tensor], arch: str, kind: str, embedding_type: str, heads: int = 0
) -> list[TensorPlan]:
    """Every tensor of the file, in order. `weights` is `GPT.state_dict()`, with those of the `heads` sequential heads
    of multi-token prediction under `mtp.heads.`.
    """
    table = weights["embedding.weight"]
    fold = folds_embedding(config, arch)

    def embedding() -> np.ndarray:
        rows = table.detach().cpu().float()
        if fold:
            rows = torch.nn.functional.rms_norm(rows, (config.dim,), eps=config.norm_eps)
        return rows.numpy()

    def head() -> np.ndarray:
        return weights.get("head.weight", table).detach().cpu().float().numpy()

    shape = (config.vocab_size, config.dim)
    plans = [TensorPlan("token_embd.weight", shape, embedding_type, embedding, False)]
    if fold or not config.tied:
        plans.append(TensorPlan("output.weight", shape, embedding_type, head, False))
    plans += [plan_slot(slot, config, weights, kind) for slot in network_slots(config, arch, kind, heads)]
    return plans


def read_slot(file: GGUFFile, slot: Slot) -> Tensor:
    """The parameter of a slot as the file has it: de-quantised, without padding, in this network's order of rows.

    Raises `UserError` when the tensor is missing or has another shape.
    """
    array = read_tensor(file, f"{slot.name}.weight", slot.stored)
    array = array[tuple(slice(size) for size in slot.shape)]
    if slot.heads:
        array = unpermute_heads(array, slot.heads)
    if slot.scale != 1:
        array = array / np.float32(slot.scale)
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def read_tensor(file: GGUFFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a known shape, in float32; raises `UserError` when it is missing or has another shape."""
    if name in file.tensors and file.tensors[name].shape != shape:
        found = list(file.tensors[name].shape)
        raise UserError(f"{file.path}: tensor {name!r} has the shape {found} instead of {list(shape)}.")
    return file.array(name)


def read_network(
    file: GGUFFile, config: GPTConfig, arch: str, kind: str, heads: int = 0
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The network in a file: its configuration as it is now (an embedding norm may be folded, the output matrix may
    have become its own) and its parameters, matrices de-quantised.

    config: of the network that was exported. Raises `UserError` when a tensor is missing or has another shape.
    """
    shape = (config.vocab_size, config.dim)
    weights = {"embedding.weight": torch.from_numpy(read_tensor(file, "token_embd.weight", shape).copy())}
    if folds_embedding(config, arch) or not config.tied:
        weights["head.weight"] = torch.from_numpy(read_tensor(file, "output.weight", shape).copy())
    for slot in network_slots(config, arch, kind, heads):
        weights[slot.source] = read_slot(file, slot)
    if folds_embedding(config, arch):
        config = replace(config, embedding_norm=False)
    return replace(config, tied="head.weight" not in weights), weights
