"""The LightningDataModule: a corpus, its tokenizer, and the position in the data."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from nanochat.data.corpora import CODE_EXTENSIONS, Corpus, Files, JsonLines, Stdlib
from nanochat.data.loader import TrainLoader, TrainSet, ValidationLoader, Windows
from nanochat.data.prepare import Source, prepare
from nanochat.data.shards import Shards
from nanochat.data.synthetic import Synthetic
from nanochat.data.tokenizer import Bytes, Tokenizer
from nanochat.errors import ConfigError, UserError

CORPORA = ("stdlib", "text", "code", "jsonl", "synthetic")
COMPRESSION_LIMIT = 4_000_000  # bytes of validation text that gzip and xz are given


class DataModule(LightningDataModule):
    """Text on its way into batches {tokens, targets: (B, T) int64; ignored target -100}.

    Args:
        corpus: stdlib, text, code, jsonl or synthetic.
        tokenizer: what builds the tokenizer (`nanochat.data.tokenizer.BPE` and its like).
        paths, val_paths: the user's own files, folders and globs; without `val_paths` one document in twenty is held out.
        extensions, max_file_bytes: which files of folders to take.
        text_key: of a JSON record.
        seq_len: T.
        batch_size, val_batch_size: sequences of a micro-batch.
        val_tokens: tokens of the validation split that are used; None = all.
        seed: of the order.
        prefetch: micro-batches prepared ahead.
        cache_dir: where token shards are kept.
        synthetic_vocab: vocabulary of corpus=synthetic.

    `consumed` counts the micro-batches trained on; the training loop raises it. Raises `ConfigError` for impossible
    values, and `UserError` in `prepare_data` when the text cannot be used.
    """

    def __init__(
        self,
        corpus: str,
        tokenizer: Any = None,
        paths: Sequence[str] = (),
        val_paths: Sequence[str] | None = None,
        extensions: Sequence[str] | None = None,
        max_file_bytes: int | None = None,
        text_key: str = "text",
        seq_len: int = 256,
        batch_size: int = 8,
        val_batch_size: int = 8,
        val_tokens: int | None = 100_000,
        seed: int = 0,
        prefetch: int = 4,
        cache_dir: str = "~/.cache/nanochat",
        synthetic_vocab: int | str | None = None,
    ) -> None:
        super().__init__()
        problems = []
        if corpus not in CORPORA:
            problems.append(f"data.corpus={corpus!r} is unknown; choose one of {', '.join(CORPORA)}.")
        paths = [paths] if isinstance(paths, str) else list(paths or ())
        val_paths = [val_paths] if isinstance(val_paths, str) else list(val_paths or ())
        if corpus in ("text", "code", "jsonl") and not paths:
            problems.append(f"data={corpus} needs text: give data.paths=[FILE,FOLDER,GLOB].")
        if corpus in ("stdlib", "synthetic") and (paths or val_paths):
            problems.append(f"data={corpus} reads no files; for your own say data=text data.paths=[...].")
        sizes = {"seq_len": seq_len, "batch_size": batch_size, "val_batch_size": val_batch_size, "prefetch": prefetch}
        if val_tokens is not None:
            sizes["val_tokens"] = val_tokens
        if max_file_bytes is not None:
            sizes["max_file_bytes"] = max_file_bytes
        for name, value in sizes.items():
            low = 2 if name == "val_tokens" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                problems.append(f"data.{name}={value!r} must be a whole number of at least {low}.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            problems.append(f"data.seed={seed!r} must be a whole number.")
        if corpus == "synthetic" and isinstance(synthetic_vocab, int) and synthetic_vocab < 2:
            problems.append(f"data.synthetic_vocab={synthetic_vocab} must be at least 2.")
        if problems:
            raise ConfigError(problems)
        self.corpus, self.paths, self.val_paths = corpus, paths, val_paths
        self.extensions = None if extensions is None else [e if e.startswith(".") else f".{e}" for e in extensions]
        self.max_file_bytes, self.text_key = max_file_bytes, text_key
        self.seq_len, self.batch_size, self.val_batch_size = seq_len, batch_size, val_batch_size
        self.val_tokens, self.seed, self.prefetch, self.cache_dir = val_tokens, seed, prefetch, cache_dir
        self.synthetic_vocab = synthetic_vocab
        self.tokenizer_spec = Bytes() if tokenizer is None or corpus == "synthetic" else tokenizer
        self.consumed = 0
        self.shards: Shards | None = None
        self._tokenizer: Tokenizer | None = None
        self._train_loader: TrainLoader | None = None

    # ---- building -----------------------------------------------------------------------------------------------

    def _corpus(self, paths: list[str], option: str) -> Corpus:
        if self.corpus == "stdlib":
            return Stdlib()
        if self.corpus == "jsonl":
            return JsonLines(paths, self.text_key, option=option)
        extensions = self.extensions
        if extensions is None and self.corpus == "code":
            extensions = CODE_EXTENSIONS
        return Files(paths, extensions, self.max_file_bytes, option=option)

    def prepare_data(self) -> None:
        """Build the shards, or find them in the cache. Raises `UserError` when the text cannot be used."""
        if self._tokenizer is not None:
            return
        if self.corpus == "synthetic":
            self._tokenizer = self.tokenizer_spec.build(())
            return
        validation = self._corpus(self.val_paths, "data.val_paths") if self.val_paths else None
        source = Source(self._corpus(self.paths, "data.paths"), validation)
        self.shards, self._tokenizer = prepare(source, self.tokenizer_spec, self.cache_dir)
        self.train_rows()  # a text that is too short is found here, before a model is built
        ValidationLoader(self.validation_tokens, self.seq_len, self.val_batch_size)

    def setup(self, stage: str | None = None) -> None:
        """Nothing that `prepare_data` has not done in this process."""
        self.prepare_data()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; there once the data is prepared."""
        if self._tokenizer is None:
            self.prepare_data()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens that can occur."""
        if self.corpus == "synthetic" and isinstance(self.synthetic_vocab, int):
            return self.synthetic_vocab
        return self.tokenizer.vocab_size

    @property
    def eot_id(self) -> int | None:
        """The token before each document; None when the data has no documents."""
        return None if self.corpus == "synthetic" else self.tokenizer.eot_id

    def token_bytes(self) -> np.ndarray | None:
        """(vocab,) int32 bytes of text per token; None when the data is no text."""
        return None if self.corpus == "synthetic" else self.tokenizer.token_bytes()

    def train_rows(self) -> TrainSet:
        """The training rows by number."""
        if self.shards is None:
            return Synthetic(self.vocab_size, self.seq_len, self.seed)
        return Windows(self.shards.train, self.seq_len, self.seed)

    @cached_property
    def validation_tokens(self) -> np.ndarray:
        """The token ids that validation reads."""
        if self.shards is None:
            rows = Synthetic(self.vocab_size, self.seq_len, self.seed + 1)
            tokens = np.concatenate([rows.row(i) for i in range(24)])
        else:
            tokens = self.shards.val
        return tokens if self.val_tokens is None else tokens[: self.val_tokens]

    # ---- loading ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> TrainLoader:
        """Endless batches from micro-batch `consumed` on; the same loader at every call."""
        if self._train_loader is None:
            pin = torch.cuda.is_available()
            self._train_loader = TrainLoader(
                self.train_rows(), self.batch_size, lambda: self.consumed, self.prefetch, pin
            )
        return self._train_loader

    def val_dataloader(self) -> ValidationLoader:
        """The fixed validation windows."""
        return ValidationLoader(self.validation_tokens, self.seq_len, self.val_batch_size)

    # ---- resume -------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What makes micro-batch number i the batch that it is."""
        return {
            "data": self.corpus if self.shards is None else self.shards.folder.name,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"consumed": self.consumed, **self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position; raises `UserError` when the data is not the same."""
        changed = [
            f"{name} {state_dict.get(name)!r} -> {value!r}"
            for name, value in self.identity().items()
            if state_dict.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the checkpoint was trained on other data, so its position means nothing: {', '.join(changed)}."
            )
        self.consumed = int(state_dict["consumed"])

    # ---- for the report -----------------------------------------------------------------------------------------

    @cached_property
    def compression(self) -> dict[str, float]:
        """Bits per byte that gzip and xz need for the very text that `val/bpb` is measured on (its first 4 MB)."""
        if self.shards is None:
            return {}
        text = self.tokenizer.decode(self.validation_tokens.tolist()).encode()[:COMPRESSION_LIMIT]
        if not text:
            return {}
        packed = {
            "gzip -9": gzip.compress(text, 9),
            "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
        }
        return {name: 8 * len(data) / len(text) for name, data in packed.items()}

    def describe(self) -> str:
        """One line for the report card."""
        if self.shards is None:
            return f"synthetic, {self.vocab_size:,} words"
        splits = self.shards.header["splits"]
        where = "" if not self.paths else f" {', '.join(Path(p).name or p for p in self.paths)}"
        return (
            f"{self.corpus}{where}: {splits['train']['documents']:,} documents, {splits['train']['bytes'] / 1e6:,.1f} MB, "
            f"{splits['train']['tokens']:,} tokens to train on; {splits['val']['documents']:,} documents to validate with"
        )
