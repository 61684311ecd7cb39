"""The LightningDataModule: a corpus, its tokenizer, and the position of a run in it."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from nanochat import ranks
from nanochat.data import sources
from nanochat.data.dataset import RankBatches, RankValidation, TrainBatches, ValBatches
from nanochat.data.loader import PrefetchLoader
from nanochat.data.prepare import COMPRESSED_BYTES, compression_of, prepare, share_of
from nanochat.data.shards import Shards
from nanochat.data.synthetic import VALIDATION_FROM, FiniteBatches, NoText, SyntheticBatches
from nanochat.data.tokenizer import BPE, Tokenizer, TokenizerSpec
from nanochat.errors import ConfigError, UserError

log = logging.getLogger(__name__)

DEFAULT_CACHE = "~/.cache/nanochat"


class DataModule(lightning.LightningDataModule):
    """Batches {"tokens", "targets"}: (B, T) int64, target -100 = ignored, from a corpus.

    Args:
        corpus: a file of nanochat.data.sources (stdlib, text, code, jsonl), synthetic, or the dotted path of a class of
            your own (see nanochat.data.sources).
        tokenizer: a specification (nanochat.data.tokenizer.BPE, Byte, GPT2) or a Tokenizer; not used by `synthetic`.
        paths: your files, folders or globs; with `stdlib` they are read as `text` in its place.
        val_paths: the same for validation; without, a twentieth of the documents is put aside.
        extensions: what to take from folders; None is every file (code: those of programming languages).
        max_file_bytes: larger files are skipped; None takes all.
        text_key: jsonl: the key of a record under which its text is (text).
        options: further arguments of the corpus' class.
        vocab_size: synthetic: ids of the sequences; "auto" is the tokenizer's 257.
        seq_len: tokens of a sequence.
        batch_size: sequences of a micro-batch.
        val_batch_size: sequences of a validation batch; None takes batch_size.
        val_tokens: validate on the first so many tokens; None takes all.
        seed: of the order of training.
        cache_dir: where prepared data is kept.
        prefetch: batches made ahead.

    `consumed` counts the micro-batches that were trained on; the LightningModule adds to it.

    Raises:
        ConfigError: arguments that cannot be used, each with a sentence.
    """

    def __init__(
        self,
        corpus: str = "stdlib",
        tokenizer: TokenizerSpec | Tokenizer | None = None,
        paths: str | list[str] | None = None,
        val_paths: str | list[str] | None = None,
        extensions: list[str] | None = None,
        max_file_bytes: int | None = None,
        text_key: str | None = None,
        options: dict[str, Any] | None = None,
        vocab_size: int | str = "auto",
        seq_len: int = 256,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_tokens: int | None = 100_000,
        seed: int = 0,
        cache_dir: str = DEFAULT_CACHE,
        prefetch: int = 4,
    ) -> None:
        super().__init__()
        self.corpus, self.paths, self.val_paths = corpus, _as_list(paths), _as_list(val_paths)
        self.extensions = None if extensions is None else _as_list(extensions)
        self.max_file_bytes, self.text_key, self.options = max_file_bytes, text_key, options or {}
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.val_batch_size, self.val_tokens = batch_size if val_batch_size is None else val_batch_size, val_tokens
        self.cache_dir, self.prefetch = str(cache_dir), prefetch
        self._synthetic_vocabulary, self._spec = vocab_size, tokenizer if tokenizer is not None else BPE()
        counts = {"seq_len": seq_len, "batch_size": batch_size, "prefetch": prefetch}
        if val_batch_size is not None:
            counts["val_batch_size"] = val_batch_size
        problems = list(self._problems(counts))
        if problems:
            raise ConfigError(problems)
        if corpus == "stdlib" and self.paths:
            self.corpus = "text"
        self.consumed = 0
        self._loader: PrefetchLoader | None = None
        self._restored: dict[str, Any] | None = None
        self._shards: Shards | None = None
        self._train: TrainBatches | SyntheticBatches | None = None
        self._val: ValBatches | FiniteBatches | None = None

    # ---- what was given ---------------------------------------------------------------------------------------------

    def _problems(self, counts: dict[str, int]) -> Iterator[str]:
        if self.corpus not in sources.names() and self.corpus != "synthetic":
            try:
                sources.find(str(self.corpus))
            except ConfigError as error:
                yield from error.problems
                return
        for name, count in counts.items():
            if not _is_count(count, 1):
                yield f"data.{name}={count} must be a whole number of at least 1."
        for name in ("val_tokens", "max_file_bytes"):
            value = getattr(self, name)
            if value is not None and not _is_count(value, 1):
                yield f"data.{name}={value} must be a whole number of at least 1, or null."
        if not _is_count(self.seed, 0):
            yield f"data.seed={self.seed} must be a whole number of at least 0."
        if not self.cache_dir.strip():
            yield "data.cache_dir is empty; give a folder."
        if not isinstance(self.text_key, str | None):
            yield f"data.text_key={self.text_key} must be a text."
        extensions = self.extensions
        if extensions is not None and not (extensions and _is_texts(extensions)):
            yield f"data.extensions={extensions} must be a list such as [.py,.rs], or null."
        if not isinstance(self._spec, Tokenizer) and not hasattr(self._spec, "build"):
            yield f"data.tokenizer={self._spec!r} is neither a tokenizer nor a specification of one."
        if self.corpus == "synthetic":
            vocabulary = self._synthetic_vocabulary
            if vocabulary != "auto" and not _is_count(vocabulary, 2):
                yield f"data.vocab_size={vocabulary} must be a whole number of at least 2, or auto."
            if self.paths or self.val_paths:
                yield "data.paths has no use with data=synthetic; choose data=text, code or jsonl."
            return
        if sources.reads_paths(self.corpus) and not self.paths:
            yield f"data.paths is empty; name files, folders or globs for data={self.corpus}: data.paths=[my.txt]."
        if self.val_paths and not self.paths:
            yield "data.val_paths needs data.paths: your validation text belongs to your training text."
        for name in ("paths", "val_paths"):
            if not _is_texts(getattr(self, name)):
                yield f"data.{name}={getattr(self, name)} must be a list of files, folders and globs."
                continue
            for path in getattr(self, name):
                if not os.path.exists(os.path.expanduser(path)) and not glob.has_magic(path):
                    yield f"data.{name}={path} does not exist; give a file, a folder or a glob."

    def _corpus(self, paths: list[str], option: str) -> sources.Corpus:
        named = {"max_file_bytes": self.max_file_bytes, "extensions": self.extensions, "text_key": self.text_key}
        return sources.build(self.corpus, paths, option, named | self.options)

    # ---- preparing --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build the shards in the cache, unless they are there; keeps no state, as Lightning demands.

        Raises:
            UserError: no text, or too little of it for one sequence; a cache that cannot be used.
        """
        if self._train is None and self.corpus != "synthetic":
            self._find_shards()

    def setup(self, stage: str | None = None) -> None:
        """Open the shards, once; builds them if `prepare_data` has not.

        Raises:
            UserError: as `prepare_data`; or a state was loaded that is of other data.
        """
        if self._train is None:
            self._open()
        if self._restored is not None:
            self._compare(self._restored)

    def _find_shards(self) -> Shards:
        val_corpus = self._corpus(self.val_paths, "data.val_paths") if self.val_paths else None
        return prepare(self._corpus(self.paths, "data.paths"), self._spec, self.cache_dir, val_corpus)

    def _open(self) -> None:
        if self.corpus == "synthetic":
            sizes = (self.vocab_size, self.seq_len)
            self._train = SyntheticBatches(*sizes, self.batch_size, self.seed)
            windows = -(-(100_000 if self.val_tokens is None else self.val_tokens) // self.seq_len)
            rows = min(self.val_batch_size, windows)
            self._val = FiniteBatches(*sizes, rows, self.seed, VALIDATION_FROM, -(-windows // rows))
            return
        shards = self._find_shards()
        size = shards.tokenizer.vocab_size
        if size < self._spec.vocab_size:
            log.warning(
                "The text is too small for tokenizer.vocab_size=%d: its tokenizer has %d tokens, and a larger model "
                "leaves the rest of its head unused (model.vocab_size=auto takes the tokenizer's).",
                self._spec.vocab_size,
                size,
            )
        train = TrainBatches(shards.train.tokens, self.seq_len, self.batch_size, self.seed, size)
        self._val = ValBatches(shards.val.tokens, self.seq_len, self.val_batch_size, size, self.val_tokens)
        self._shards, self._train = shards, train

    def _prepared(self) -> Shards | None:
        """The shards; None for `synthetic`."""
        if self._train is None:
            raise RuntimeError("call setup() first")
        return self._shards

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens."""
        if self.corpus == "synthetic":
            return NoText()
        shards = self._prepared()
        assert shards is not None
        return shards.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        if self.corpus == "synthetic" and self._synthetic_vocabulary != "auto":
            return int(self._synthetic_vocabulary)
        return self.tokenizer.vocab_size

    @property
    def planned_vocab_size(self) -> int:
        """`vocab_size` before anything is prepared; a BPE that finds too little text will have fewer tokens."""
        return self.vocab_size if self.corpus == "synthetic" else self._spec.vocab_size

    @property
    def eot_id(self) -> int | None:
        """The token before each document; None where there are no documents."""
        return None if self.corpus == "synthetic" else self.tokenizer.eot_id

    def token_bytes(self) -> np.ndarray | None:
        """(vocab,) int32: bytes of text for each id, 0 for special tokens; None without text."""
        return self.tokenizer.token_bytes()

    @property
    def header(self) -> dict[str, Any]:
        """The shards' header; `{}` for `synthetic`."""
        shards = self._prepared()
        return {} if shards is None else shards.header

    @property
    def folder(self) -> str | None:
        """Where the prepared data is; None for `synthetic`."""
        shards = self._prepared()
        return None if shards is None else str(shards.folder)

    @property
    def train_tokens(self) -> int | None:
        """Tokens of the training split; None for `synthetic`, which has no end."""
        shards = self._prepared()
        return None if shards is None else len(shards.train.tokens)

    @cached_property
    def val_bytes(self) -> int | None:
        """Bytes of text that a validation covers (`val_tokens` may cut the split); None without text."""
        ids, table = self._val_targets(), self.tokenizer.token_bytes()
        return None if ids is None or table is None else int(table[ids].sum())

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text for each validation target; None without text."""
        ids = self._val_targets()
        return None if ids is None or self.val_bytes is None else self.val_bytes / len(ids)

    @cached_property
    def compression(self) -> dict[str, float]:
        """Bits per byte of `gzip -9` and `xz -9e` on the text that a validation covers (its first 2 MB)."""
        shards, ids = self._prepared(), self._val_targets()
        if shards is None or ids is None:
            return {}
        if len(ids) == len(shards.val.tokens) - 1:
            return dict(shards.header["compression"]["bits_per_byte"])
        kept = ids[:COMPRESSED_BYTES]
        text = self.tokenizer.decode(kept[kept != self.tokenizer.eot_id].tolist())
        return compression_of(text.encode())

    def _val_targets(self) -> np.ndarray | None:
        shards = self._prepared()
        if shards is None:
            return None
        assert isinstance(self._val, ValBatches)
        return np.asarray(shards.val.tokens[1 : self._val.targets + 1])

    def describe(self) -> str:
        """One line about the data, for reports."""
        if self.corpus == "synthetic":
            return f"synthetic: sequences of {self.seq_len} ids below {self.vocab_size:,}, no text"
        header = self.header
        train, val = header["splits"]["train"], header["splits"]["val"]
        skipped = f", {header['skipped']['count']} skipped" if header["skipped"]["count"] else ""
        ids = self._val_targets()
        used = 0 if ids is None else len(ids)
        part = f", validated on {used:,}" if used < val["tokens"] - 1 else ""
        return (
            f"{self.corpus}: {train['documents']:,} documents of {train['bytes'] / 1e6:.1f} MB, "
            f"{train['tokens']:,} tokens to train on; {val['documents']:,} of {val['bytes'] / 1e6:.2f} MB, "
            f"{val['tokens']:,} tokens to validate ({share_of(header):.1%} of the text){part}{skipped}; "
            f"{self.tokenizer!r}"
        )

    # ---- loading ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> PrefetchLoader:
        """The endless micro-batches from number `consumed` on; the same loader at every call."""
        self._prepared()
        assert self._train is not None
        if self._loader is None:
            trainer = self.trainer
            device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
            batches = self._train if ranks.world() == 1 else RankBatches(self._train, ranks.rank(), ranks.world())
            self._loader = PrefetchLoader(batches, lambda: self.consumed, self.prefetch, device)
        return self._loader

    def val_dataloader(self) -> ValBatches | FiniteBatches | RankValidation:
        """The same batches at each validation."""
        self._prepared()
        assert self._val is not None
        return self._val if ranks.world() == 1 else RankValidation(self._val, ranks.rank(), ranks.world())

    # ---- position ---------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What makes micro-batch i the same micro-batch."""
        shards = self._prepared()
        data = f"synthetic of {self.vocab_size}" if shards is None else shards.identity
        rows = self.batch_size * ranks.world()
        return {"data": data, "seed": self.seed, "seq_len": self.seq_len, "batch_size": rows}

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"consumed": self.consumed, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position of a saved run.

        Raises:
            UserError: when the state is of other data or another order; lists what differs.
        """
        consumed = state_dict.get("consumed") if isinstance(state_dict, dict) else None
        if not _is_count(consumed, 0):
            raise UserError("the checkpoint says nothing of the position in the data, so it cannot be resumed.")
        self._restored = state_dict
        if self._train is not None:
            self._compare(state_dict)
        self.consumed = int(consumed)  # type: ignore[arg-type]

    def _compare(self, state: dict[str, Any]) -> None:
        here, names = self._identity(), {"data": "the text or its tokenizer"}
        if ranks.world() > 1:
            rows = f"data.batch_size={self.batch_size} on {ranks.world()} ranks"
            names["batch_size"] = f"{rows} (it was {state.get('batch_size')} rows together)"
        differences = [
            names[key] if key in names else f"data.{key}={here[key]} (it was {state.get(key)})"
            for key in here
            if here[key] != state.get(key)
        ]
        if differences:
            raise UserError(
                f"this run cannot be resumed, since its data would be other data: {', '.join(differences)} changed; "
                "put it back, or start a new run."
            )


def _as_list(values: Any) -> list[Any]:
    """What YAML and Python give for a list of texts: none, one, a list, or Hydra's own lists."""
    if values is None:
        return []
    values = [values] if isinstance(values, str | Path) or not isinstance(values, Sequence) else list(values)
    return [str(value) if isinstance(value, Path) else value for value in values]


def _is_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value for value in values)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
