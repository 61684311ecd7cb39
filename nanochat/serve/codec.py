"""Text and tokens of a served model: from a run's tokenizer, or from a GGUF file through llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.export.llama_cpp import LlamaModel


class Codec(Protocol):
    """Turns text into tokens and back."""

    vocab_size: int
    begin: list[int]
    """what stands before a text of its own"""
    stop_ids: frozenset[int]
    """tokens with which an answer ends"""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids, without `begin`; special: names of special tokens in the text become those tokens.

        Raises `UserError` for a text that is not Unicode (half a surrogate pair).
        """
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        ...


class RunCodec:
    """The tokenizer of one of our runs. None of its text can be a special token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.begin = [tokenizer.eot_id]
        self.stop_ids = frozenset((tokenizer.eot_id,))

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text)

    def piece(self, token: int) -> bytes:
        return self.tokenizer.piece(token)

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode(errors="replace")


class LlamaCodec:
    """The vocabulary in a GGUF file, whoever made it."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.begin = [model.begin] if model.begin is not None else []
        self.stop_ids = frozenset(token for token in range(self.vocab_size) if model.ends(token))

    def encode(self, text: str, special: bool = False) -> list[int]:
        try:
            return self._model.tokenize(text, parse_special=special)
        except UnicodeEncodeError:
            raise UserError("a text with half a surrogate pair is not UTF-8 and cannot be encoded.") from None

    def piece(self, token: int) -> bytes:
        return self._model.piece(token) if 0 <= token < self.vocab_size else b""

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode(errors="replace")
