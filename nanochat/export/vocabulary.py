"""A run's `tokenizer.json` as GGUF's tokenizer keys.

llama.cpp has byte-level BPE with a list of pre-tokenizers that it knows by name; the file must use one of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types
_NO_MERGE = "Ġ" * 8

# pre-tokenizer regular expressions of the field, and llama.cpp's names for them
_REGEXES = {
    # GPT-2, which `tokenizers` applies inside ByteLevel(use_regex=True)
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF and Hugging Face want to know of a tokenizer."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    """llama.cpp's name of the pre-tokenizer"""
    eot_id: int
    source: str
    """the whole `tokenizer.json`"""


def read_vocabulary(path: Path, size: int, eot_id: int) -> Vocabulary:
    """Read a `tokenizers` JSON file and fill the vocabulary up to the model's.

    Args:
        path: `tokenizer.json`.
        size: rows of the model's embedding; ids beyond the tokenizer's become unused `[PAD<id>]` tokens.
        eot_id: the token that separates documents.

    Raises:
        UserError: not byte-level BPE, a pre-tokenizer that llama.cpp does not have, or more tokens than
            `size`.
    """
    try:
        source = path.read_text(encoding="utf-8")
        data: dict[str, Any] = json.loads(source)
        model = data["model"]
        vocabulary: dict[str, int] = dict(model["vocab"])
        special = {item["content"]: item["id"] for item in data.get("added_tokens") or [] if item.get("special")}
        vocabulary |= {item["content"]: item["id"] for item in data.get("added_tokens") or []}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
        kind = model.get("type", "BPE")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a tokenizer of the `tokenizers` library.") from error
    if kind != "BPE":
        raise UserError(f"{path} is a {kind} tokenizer; llama.cpp needs byte-level BPE here.")
    names = {index: token for token, index in vocabulary.items()}
    highest = max(names, default=-1)
    if highest >= size:
        raise UserError(f"{path} has token ids up to {highest}, more than the model's vocabulary of {size}.")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    control = {*special.values(), eot_id}
    types = [CONTROL if index in control else NORMAL if index in names else UNUSED for index in range(size)]
    pre = _pre_tokenizer(path, data, merges)
    # llama.cpp refuses a file without merges; this one never applies, since its result is no token
    return Vocabulary(tokens, types, merges or [f"{_NO_MERGE} {_NO_MERGE}"], pre, eot_id, source)


def _pre_tokenizer(path: Path, data: dict[str, Any], merges: list[str]) -> str:
    if data.get("normalizer"):
        raise UserError(f"{path} has a normalizer, which llama.cpp does not apply.")
    pre = data.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False}] if not merges:
            return "gpt-2"  # bytes stay bytes however the text is split
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": False}]:
            if regex in _REGEXES:
                return _REGEXES[regex]
    raise UserError(f"{path} has a pre-tokenizer that llama.cpp does not know; train with tokenizer=bpe or gpt2.")
