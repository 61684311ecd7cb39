"""Tokenizers: text -> ids and back. All three kinds are byte-level BPE and lie in one `tokenizer.json`.

The file has the format of the `tokenizers` library. Text is cut before the merges as GPT-2 cuts it, which llama.cpp
knows as `pre=gpt-2`; every byte has a token, so that nothing is unknown and decoding gives back the very text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat.data import gpt2
from nanochat.errors import ConfigError, UserError
from nanochat.files import atomic_write

EOT = "<|endoftext|>"
_EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>")  # ours first; the others for files made elsewhere
PIECE = 1 << 16
_CUT = re.compile(r"[^\s\u180e]\n")  # U+180E was white space in older Unicode


def pieces(text: str) -> Iterator[str]:
    """Cut a long text where no token can cross: encoding the pieces gives the tokens of the whole.

    GPT-2's pattern never matches from a visible character into a line break, and looks neither back nor, from a
    visible character, ahead; so between the two is a border whatever surrounds it.
    """
    start = 0
    while len(text) - start > PIECE:
        match = _CUT.search(text, start + PIECE)
        if match is None:
            break
        yield text[start : match.start() + 1]
        start = match.start() + 1
    yield text[start:]


class Tokenizer:
    """A byte-level tokenizer.

    Args:
        inner: the `tokenizers` object.
        name: what to call it in reports.

    Raises:
        UserError: without a token that separates documents.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "bpe") -> None:
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # a document that writes <|endoftext|> does not end there
        vocabulary = inner.get_vocab(with_added_tokens=True)
        eot = next((vocabulary[known] for known in _EOT_NAMES if known in vocabulary), None)
        if eot is None:
            raise UserError(f"the tokenizer {name} has no {EOT} token to separate documents.")
        self._inner, self.name = inner, name
        self.eot_id: int = eot
        self.vocab_size: int = max(vocabulary.values()) + 1

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            UserError: no such file, or not of the `tokenizers` library.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise UserError(f"the tokenizer {path} cannot be read: {reason}.") from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} is no tokenizer.json of the `tokenizers` library: {error}.") from error
        tokenizer = cls(inner, str(path))
        merges = (json.loads(text).get("model") or {}).get("merges")
        # of as many tokens as GPT-2's may be one of ours, too, but for where the separator is
        sizes = (tokenizer.vocab_size, tokenizer.eot_id)
        gpt2s = sizes == (gpt2.VOCAB_SIZE, gpt2.VOCAB_SIZE - 1)
        tokenizer.name = "gpt2" if gpt2s else "bpe" if merges else "byte"
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all."""
        with atomic_write(Path(path)) as file:
            file.write(self._inner.to_str(pretty=True).encode())

    def encode(self, text: str) -> list[int]:
        """The ids of a text; special tokens in it are plain text.

        Raises:
            UserError: half a surrogate pair, which no UTF-8 text has.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, on all cores."""
        try:
            return [e.ids for e in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            raise UserError("a text with half a surrogate pair is not UTF-8 and cannot be encoded.") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; ids without a token give nothing, bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([i for i in map(int, ids) if i >= 0], skip_special_tokens=False)

    def piece(self, index: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none for an id without a token."""
        token = self._inner.id_to_token(index)
        if token is None:
            return b""
        if index in self._added or not all(character in self._byte_of for character in token):
            return token.encode()
        return bytes(self._byte_of[character] for character in token)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._inner.get_added_tokens_decoder())

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        return {character: byte for byte, character in enumerate(gpt2.byte_characters())}

    def token_bytes(self) -> np.ndarray | None:
        """(vocab_size,) int32: bytes of text per token, 0 for special tokens; None where tokens are no text.

        Raises:
            UserError: when the tokenizer is not byte-level, so that tokens have no fixed number of bytes.
        """
        return self._token_bytes.copy()

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        if '"ByteLevel"' not in json.dumps(json.loads(self._inner.to_str())["decoder"]):
            raise UserError(f"the tokenizer {self.name} is not byte-level, so bits per byte cannot be had.")
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._inner.get_added_tokens_decoder()
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            if index not in added:
                sizes[index] = len(token)  # byte-level BPE writes each byte as one character
            elif not added[index].special:
                sizes[index] = len(token.encode())
        return sizes

    @cached_property
    def hash(self) -> str:
        """sha256 of its JSON: the same for tokenizers that do the same."""
        return hashlib.sha256(self._inner.to_str(pretty=False).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"{self.name} of {self.vocab_size:,} tokens"


class TokenizerSpec(Protocol):
    """How to come by a tokenizer: what `conf/tokenizer/*.yaml` name.

    Specifications are no dataclasses, which Hydra would turn into mappings on their way into the DataModule.
    """

    vocab_size: int
    """the tokens of what `build` gives, fewer where it is trained on too little text"""

    def build(self, documents: Iterable[str]) -> Tokenizer:
        """The tokenizer, trained on `documents` where it is trained at all."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that change whenever `build` would give something else for the same documents."""
        ...


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    return inner


class BPE:
    """Byte-level BPE trained on the training split.

    Args:
        vocab_size: with the 256 bytes and `<|endoftext|>` (id 0); at least 257.
        train_bytes: train on the first so many bytes of text; None takes all.
    """

    def __init__(self, vocab_size: int = 4096, train_bytes: int | None = 1_000_000_000) -> None:
        problems = []
        if not _is_count(vocab_size) or vocab_size < 257:
            problems.append(
                f"tokenizer.vocab_size={vocab_size} must be a whole number of at least 257: "
                "256 bytes and the token that separates documents."
            )
        if train_bytes is not None and (not _is_count(train_bytes) or train_bytes < 1):
            problems.append(f"tokenizer.train_bytes={train_bytes} must be a whole number of at least 1, or null.")
        if problems:
            raise ConfigError(problems)
        self.vocab_size, self.train_bytes = vocab_size, train_bytes

    def build(self, documents: Iterable[str]) -> Tokenizer:
        """Deterministic: ties between pairs are broken by their ids, whatever the number of threads.

        Text with too few pairs gives fewer tokens.
        """
        inner = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(self._first_bytes(documents), trainer)
        return Tokenizer(inner, "bpe")

    def identity(self) -> dict[str, Any]:
        return {"kind": "bpe", "vocab_size": self.vocab_size, "train_bytes": self.train_bytes}

    def _first_bytes(self, documents: Iterable[str]) -> Iterator[str]:
        left = self.train_bytes
        for document in documents:
            if left is not None:
                if left <= 0:
                    return
                left -= len(document.encode())
            yield from pieces(document)


class Byte:
    """No merges: id = value of the byte, and `<|endoftext|>` = 256."""

    vocab_size = 257

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        inner = _byte_level(models.BPE(vocab=gpt2.byte_vocabulary(), merges=[]))
        inner.add_special_tokens([EOT])
        return Tokenizer(inner, "byte")

    def identity(self) -> dict[str, Any]:
        return {"kind": "byte"}


class GPT2:
    """GPT-2's tokenizer of 50,257 tokens, out of a file: nothing is downloaded.

    Args:
        path: `tokenizer.json`, `vocab.bpe`, `merges.txt`, `gpt2.tiktoken`, or a folder with one of them; None looks
            in installed packages and caches.
    """

    vocab_size = gpt2.VOCAB_SIZE

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def build(self, documents: Iterable[str] = ()) -> Tokenizer:
        path = gpt2.find(self.path)
        if path.suffix == ".json":
            tokenizer = Tokenizer.load(path)
        else:
            vocabulary, merges = gpt2.read(path)
            try:
                inner = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
            except Exception as error:  # the library raises bare Exceptions
                raise UserError(f"tokenizer.path={path} is no list of GPT-2's merges or tokens: {error}.") from error
            inner.add_special_tokens([EOT])
            tokenizer = Tokenizer(inner, "gpt2")
        if tokenizer.vocab_size != gpt2.VOCAB_SIZE or tokenizer.eot_id != gpt2.VOCAB_SIZE - 1:
            raise UserError(
                f"tokenizer.path={path} is not GPT-2's: it has {tokenizer.vocab_size} tokens, not {gpt2.VOCAB_SIZE}."
            )
        tokenizer.name = "gpt2"
        return tokenizer

    def identity(self) -> dict[str, Any]:
        path = gpt2.find(self.path)
        return {"kind": "gpt2", "sha256": hashlib.sha256(gpt2.read_bytes(path)).hexdigest()}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
