"""GGUF files that nanochat did not make, written with the package `gguf`: other architectures, other tokenizers."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import numpy as np

ANSWER = ["▁Gr", "<0xC3>", "<0xBC>", "ße", "▁", "<0xF0>", "<0x9F>", "<0x9A>", "<0x80>", "</s>"]
"""what the chat model says to everything: characters of two and four tokens, and the token that ends it"""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROL, USER_DEFINED, BYTE, UNKNOWN = 3, 4, 6, 2


def sentencepiece() -> tuple[list[str], list[int]]:
    """Tokens and types of a vocabulary of SentencePiece's kind, with a token for each byte."""
    tokens, types = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    for piece in ("<|user|>", "<|assistant|>", "<|system|>"):
        tokens.append(piece)
        types.append(USER_DEFINED)
    words = ["▁", "▁Gr", "ße", *"abcdefghijklmnopqrstuvwxyz", "he", "▁he"]
    tokens += words
    types += [1] * len(words)
    while len(tokens) % 32:
        tokens.append(f"<unused{len(tokens)}>")
        types.append(CONTROL)
    return tokens, types


def _begin(path: Path, architecture: str, width: int, tokens: list[str], types: list[int]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("a stranger")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    return writer


def _write(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gpt2(path: Path, template: str | None = TEMPLATE) -> Path:
    """A GPT-2 (layer norms, biases, learned positions) that writes the successor of its last token: `ANSWER` after
    `<|assistant|>`, else the next token of the vocabulary.
    """
    tokens, types = sentencepiece()
    width = len(tokens)
    writer = _begin(path, "gpt2", width, tokens, types)
    writer.add_head_count(4)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_eps(1e-5)
    if template is not None:
        writer.add_chat_template(template)
    following = {index: (index + 1) % width for index in range(width)}
    chain = ["<|assistant|>", *ANSWER]
    following |= {tokens.index(a): tokens.index(b) for a, b in itertools.pairwise(chain)}
    head = np.zeros((width, width))
    for last, successor in following.items():
        head[successor, last] = 1.0
    zero = {
        "attn_qkv.weight": (3 * width, width), "attn_qkv.bias": 3 * width, "attn_output.weight": (width, width),
        "attn_output.bias": width, "ffn_up.weight": (32, width), "ffn_up.bias": 32, "ffn_down.weight": (width, 32),
        "ffn_down.bias": width, "attn_norm.weight": width, "attn_norm.bias": width, "ffn_norm.weight": width,
        "ffn_norm.bias": width,
    }  # fmt: skip
    tensors = {
        "token_embd.weight": np.eye(width),
        "position_embd.weight": np.zeros((128, width)),
        "output_norm.weight": np.ones(width),
        "output_norm.bias": np.zeros(width),
        "output.weight": head,
    }
    _write(writer, tensors | {f"blk.0.{name}": np.zeros(shape) for name, shape in zero.items()})
    return path


def write_mamba(path: Path) -> Path:
    """A Mamba of random weights: its state cannot be cut back to fewer tokens."""
    tokens, types = sentencepiece()
    width, inner, state, rank = 32, 64, 8, 2
    writer = _begin(path, "mamba", width, tokens, types)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), width), "output.weight": (len(tokens), width),
        "blk.0.ssm_in.weight": (2 * inner, width), "blk.0.ssm_conv1d.weight": (inner, 4),
        "blk.0.ssm_conv1d.bias": inner,
        "blk.0.ssm_x.weight": (rank + 2 * state, inner), "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": inner,
        "blk.0.ssm_d": inner, "blk.0.ssm_out.weight": (width, inner),
    }  # fmt: skip
    tensors = {name: draw.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors |= {"blk.0.ssm_a": -np.tile(np.arange(1, state + 1) * 0.05, (inner, 1))}
    tensors |= {name: np.ones(width) for name in ("output_norm.weight", "blk.0.attn_norm.weight")}
    _write(writer, tensors)
    return path


def write_without_tokenizer(path: Path) -> Path:
    """A file whose vocabulary is numbers alone."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("none")
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = {f"blk.0.{name}.weight": np.eye(32) for name in names}
    tensors |= {name: np.ones(32) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")}
    _write(writer, tensors | {"token_embd.weight": np.ones((64, 32))})
    return path
