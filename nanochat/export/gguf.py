"""A GGUF file that stock llama.cpp runs, with exactly the weights that were trained.

| block | architecture in llama.cpp |
|---|---|
| default (QK-norm) | `qwen3` |
| default, with sequential heads of multi-token prediction | `hy_v3`: the heads are its `nextn` blocks |
| `qk_norm=false` | `llama`: the rows of q and k are permuted, since its RoPE turns neighbours |
| `sub_norm=true`, `qk_norm=false` | `bitnet` |
| anything, with `own=True` | `nanochat`: only nanochat runs it |

A norm after the embedding becomes part of the table: every row is divided by its root mean square. The output
matrix is then another one than the table, and is written on its own also when the model is tied.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nanochat
from nanochat.checkpoint import Run
from nanochat.errors import UserError
from nanochat.export.card import model_card
from nanochat.export.gguf_reader import GGUFFile
from nanochat.export.gguf_tensors import (
    OWN,
    TensorPlan,
    folds_embedding,
    has_heads,
    mtp_heads,
    padded_ffn,
    plan_tensors,
)
from nanochat.export.packing import (
    BLOCK,
    EMBEDDING_TYPES,
    FLOAT_TYPES,
    NUMBERS,
    TERNARY_TYPES,
    TYPES,
    gguf_library,
    pack,
    packed_bytes,
)
from nanochat.export.vocabulary import Vocabulary, read_vocabulary
from nanochat.files import replacing
from nanochat.model.config import GPTConfig
from nanochat.run_folder import read_chat_template

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}  # general.file_type, llama_ftype


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    architecture: str
    type: str
    size: int
    """bytes"""
    f16_size: int
    """bytes that the network's parameters take in float16"""
    notes: list[str]


def architecture(config: GPTConfig, nextn: int = 0) -> str:
    """llama.cpp's name for this network with so many sequential heads of multi-token prediction.

    Raises `UserError` that names every switch which stands in the way.
    """
    obstacles = []
    if config.activation != "silu":
        obstacles.append(f"model.activation={config.activation} (silu is needed)")
    if config.softcap:
        obstacles.append(f"model.softcap={config.softcap} (0 is needed)")
    if config.value_embeddings and config.value_gate != "static":
        obstacles.append(f"model.value_gate={config.value_gate} (static is needed)")
    if config.sub_norm and config.value_embeddings:
        obstacles.append(
            f"model.sub_norm=true together with model.value_embeddings={config.value_embeddings} (bitnet's attention "
            "is as wide as its stream)"
        )
    if config.streams > 1:
        obstacles.append(f"mhc.streams={config.streams} (export with --to nanochat instead)")
    if config.sub_norm and config.qk_norm:
        obstacles.append("model.sub_norm=true together with model.qk_norm=true (bitnet has no QK-norm)")
    if config.sub_norm and (config.embedding_norm or not config.tied):
        obstacles.append(
            "model.sub_norm=true with an output matrix that is not the embedding table "
            "(bitnet needs model.tied=true and model.embedding_norm=false)"
        )
    if obstacles:
        raise UserError(f"stock llama.cpp cannot run this network: {'; '.join(obstacles)}.")
    if config.sub_norm:
        return "bitnet"
    if not config.qk_norm:
        return "llama"
    return "hy_v3" if nextn else "qwen3"


def _shares_scales(config: GPTConfig, kind: str) -> bool:
    """Whether every block of a type lies within weights that share one scale."""
    return config.weight_block == "row" or int(config.weight_block) % BLOCK[kind] == 0


def default_type(config: GPTConfig) -> str:
    """The smallest type that holds this network's matrices exactly: for a ternary one tq2_0, q2_0 or q4_0."""
    types = ("tq2_0", "q2_0", "q4_0") if config.ternary else ()
    width = math.gcd(config.dim, config.stream_width)
    return next((t for t in types if width % BLOCK[t] == 0 and _shares_scales(config, t)), "f16")


def default_embedding_type(kind: str) -> str:
    """The type of the embedding and the output matrix beside matrices of a type."""
    return kind if kind in FLOAT_TYPES else "q8_0"


def check_type(config: GPTConfig, kind: str, embedding_type: str) -> None:
    """Raises `UserError` when the tensor type cannot hold this network's matrices exactly, naming the
    option.
    """
    if kind not in TYPES:
        raise UserError(f"--type {kind} is unknown; choose one of {', '.join(TYPES)}.")
    if embedding_type not in EMBEDDING_TYPES:
        raise UserError(f"--embedding-type {embedding_type} is unknown; choose one of {', '.join(EMBEDDING_TYPES)}.")
    width = f"model.dim is {config.dim}"
    if config.lane_width:
        lane = f"{config.value_embeddings} x model.value_embedding_width={config.value_width}"
        width = f"model.dim={config.dim} and the lane of value embeddings ({lane}) make {config.stream_width}"
    if kind in TERNARY_TYPES:
        _check_ternary_type(config, kind, width)
    if config.stream_width % BLOCK[embedding_type]:
        raise UserError(
            f"--embedding-type {embedding_type} needs a width that is a multiple of {BLOCK[embedding_type]}, "
            f"and {width}; use --embedding-type f16."
        )


def _check_ternary_type(config: GPTConfig, kind: str, width: str) -> None:
    """`check_type` for the types that hold ternary matrices; `width`: the stream's, in words."""
    if not config.ternary:
        raise UserError(f"--type {kind} is for ternary weights, and model.ternary=false; use --type f16 or f32.")
    if config.dim % BLOCK[kind] or config.stream_width % BLOCK[kind]:
        divisor = math.gcd(config.dim, config.stream_width)
        if config.dim % BLOCK[kind]:  # a lane begins where a block does
            width = f"model.dim is {config.dim}"
        smaller = [name for name in ("q2_0", "q4_0") if divisor % BLOCK[name] == 0]
        raise UserError(
            f"--type {kind} needs a width that is a multiple of {BLOCK[kind]}, and {width}; "
            f"use --type {', '.join([*smaller, 'f16'])} or f32."
        )
    if not _shares_scales(config, kind):
        raise UserError(
            f"--type {kind} has one scale for every {BLOCK[kind]} weights, and model.weight_block is "
            f"{config.weight_block}; use --type f16 or f32."
        )


def network_keys(config: GPTConfig, arch: str, kind: str, nextn: int = 0) -> dict[str, Any]:
    """The keys that describe the network to whoever runs it."""
    extra: dict[str, Any] = {}
    if nextn:
        extra[f"{arch}.nextn_predict_layers"] = nextn
    if arch == "hy_v3":
        extra["hy_v3.expert_feed_forward_length"] = 0  # it asks for it also without experts
    return {
        **extra,
        "general.file_type": FILE_TYPES[kind],
        f"{arch}.context_length": config.seq_len,
        f"{arch}.embedding_length": config.stream_width,
        f"{arch}.block_count": config.n_layers + nextn,
        f"{arch}.feed_forward_length": padded_ffn(config, kind),
        f"{arch}.attention.head_count": config.n_heads,
        f"{arch}.attention.head_count_kv": config.n_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": config.rope_base,
        f"{arch}.vocab_size": config.vocab_size,
    }


def check_keys(file: GGUFFile, config: GPTConfig, arch: str, kind: str, nextn: int = 0) -> None:
    """Raises `UserError` that names the first key of `network_keys` which a file lacks or contradicts."""
    for key, expected in network_keys(config, arch, kind, nextn).items():
        found = file.metadata.get(key)
        if found != (float(np.float32(expected)) if isinstance(expected, float) else expected):
            raise UserError(f"{file.path}: the key {key} is {found!r} instead of {expected!r}.")


def metadata(
    config: GPTConfig, kind: str, arch: str, vocabulary: Vocabulary, card: dict[str, Any], nextn: int = 0
) -> dict[str, Any]:
    """Every key of the file. `card` holds keys of a model card, such as `general.name`."""
    return {
        **card,
        "general.type": "model",
        "general.quantization_version": 2,
        **network_keys(config, arch, kind, nextn),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": vocabulary.eot_id,
        "tokenizer.ggml.eos_token_id": vocabulary.eot_id,
        # a document begins with the separator in training, so a prompt does too
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.huggingface.json": vocabulary.source,
        "nanochat.version": nanochat.__version__,
        "nanochat.config": json.dumps(dataclasses.asdict(config)),
    }


def write_gguf(path: Path, arch: str, keys: dict[str, Any], plans: list[TensorPlan]) -> None:
    """Write a GGUF file tensor by tensor, aside, and rename it when it is whole.

    Raises `UserError` when the folder cannot be written or a tensor does not fit its type.
    """
    gguf = gguf_library()
    try:
        with replacing(path) as aside:
            _write(gguf.GGUFWriter(aside, arch), keys, plans)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _write(writer: Any, keys: dict[str, Any], plans: list[TensorPlan]) -> None:
    for key, value in keys.items():
        _add_key(writer, key, value)
    for plan in plans:
        size = packed_bytes(plan.shape, plan.type)
        # any dtype but uint8: of bytes the library would work out the shape, from the types that it knows
        writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.int8), size, raw_dtype=NUMBERS[plan.type])  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for plan in plans:
        try:
            writer.write_tensor_data(pack(plan.values(), plan.type, plan.exact))
        except UserError as error:
            raise UserError(f"{plan.name}: {error}") from error
    writer.close()


def _add_key(writer, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def export_gguf(
    run: Run,
    path: str | Path,
    kind: str = "tq2_0",
    embedding_type: str | None = None,
    *,
    own: bool = False,
    mtp: bool = True,
    force: bool = False,
    name: str | None = None,
    licence: str | None = None,
) -> ExportReport:
    """Write a run as a GGUF file for stock llama.cpp, or as one that only nanochat runs.

    Args:
        run: from `nanochat.checkpoint.load_run`.
        path: the file to write.
        kind: type of the blocks' matrices: tq2_0 (smallest with speed on CPUs), tq1_0 (smallest), q2_0 (has CUDA and
            Metal kernels), q4_0, f16 or f32.
        embedding_type: type of the embedding and the output matrix: q8_0 (default beside the ternary types),
            f16 or f32 (default beside f16 and f32).
        own: use the architecture name `nanochat`, which holds every switch of this network; any GGUF tool can read
            the tensors, and nanochat can run them.
        mtp: with the run's sequential heads of multi-token prediction, if it has any and the architecture takes them.
        force: replace an existing file.
        name, licence: for the model card.

    Raises:
        UserError: a network that llama.cpp cannot run or a type that cannot hold it (naming the switch), a
            file that exists, or a folder that cannot be written. Nothing is left behind then.
    """
    path = Path(path)
    embedding_type = embedding_type or default_embedding_type(kind)
    nextn = mtp_heads(run.objectives) if mtp else 0
    arch = OWN if own else architecture(run.config, nextn)
    dropped = 0 if has_heads(arch) else nextn
    nextn -= dropped
    check_type(run.config, kind, embedding_type)
    check_target(path, force)
    weights = run.gpt.state_dict() | run.objectives
    plans = plan_tensors(run.config, weights, arch, kind, embedding_type, nextn)
    vocabulary = read_vocabulary(run.folder / "tokenizer.json", run.config.vocab_size, run.tokenizer.eot_id)
    keys = metadata(run.config, kind, arch, vocabulary, model_card(run, name, licence), nextn)
    template = read_chat_template(run.folder)
    if template is not None:
        keys["tokenizer.chat_template"] = template
    write_gguf(path, arch, keys, plans)
    parameters = sum(parameter.numel() for parameter in run.gpt.parameters())
    notes = _notes(run.config, arch, kind, embedding_type)
    if nextn:
        parameters += sum(tensor.numel() for name, tensor in run.objectives.items() if name.startswith("mtp."))
        advice = "" if arch == OWN else " (--no-mtp leaves them out, for programs that do not know hy_v3)"
        notes.append(f"{nextn} head{'s' * (nextn > 1)} of multi-token prediction to draft with{advice}")
    if dropped:
        notes.append(f"the heads of multi-token prediction are left out: {arch} in llama.cpp has no place for them")
    return ExportReport(path, arch, kind, path.stat().st_size, 2 * parameters, notes)


def check_target(path: Path, force: bool) -> None:
    """Raises `UserError` when `path` must not or cannot be written."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file.")
    if path.exists() and not force:
        raise UserError(f"{path} exists; use --force to replace it, or --out for another file.")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}.")


def _notes(config: GPTConfig, arch: str, kind: str, embedding_type: str) -> list[str]:
    notes = []
    if config.tied and folds_embedding(config, arch):
        notes.append(
            "the embedding norm is folded into the table, so the tied output matrix is stored once more "
            f"({config.vocab_size} x {config.dim} in {embedding_type})"
        )
    if config.lane_width:
        notes.append(
            f"the value embeddings are a lane of {config.lane_width} beside the stream of {config.dim}; all columns "
            "that read it are zeros but for the values'"
        )
    if padded_ffn(config, kind) != config.ffn_dim:
        notes.append(f"the feed-forward width {config.ffn_dim} is padded with zeros to {padded_ffn(config, kind)}")
    if kind in ("tq2_0", "tq1_0") and arch != OWN:
        notes.append(f"llama.cpp has no CUDA kernels for {kind}; for a GPU use --type q2_0")
    if config.ternary and kind in ("f16", "f32") and arch != OWN:
        notes.append("llama.cpp computes with float activations here; training rounded them to int8")
    return notes
