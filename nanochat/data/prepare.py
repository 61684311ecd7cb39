"""Text -> tokenizer -> token shards, built once and kept.

A build happens in a folder beside its final place and is renamed when it is whole, under a lock: a killed build
leaves nothing that could be taken for shards, and of two runs that start at once one builds and the other waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nanochat.data.corpora import Corpus, Document, held_out
from nanochat.data.shards import FORMAT, HEADER, SPLITS, Shards, SplitWriter, dtype_for, read_shards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError

log = logging.getLogger(__name__)

BATCH_BYTES = 4_000_000  # text that is tokenised at a time
PIECE_BYTES = 1_000_000  # longer documents are tokenised in pieces, cut at a line
TAIL = 0.05  # share of each document that validates when whole documents cannot be held out
LISTED_SKIPS = 50


class Source:
    """A corpus with its split into training and validation documents.

    Args:
        corpus: the training text (and the validation text, unless `validation` is given).
        validation: a corpus of its own for validation.

    Exact duplicates are dropped, so that no text is in both splits. Documents are held out by a hash of their name;
    a corpus of too few documents for that gives the last twentieth of each of them.
    """

    def __init__(self, corpus: Corpus, validation: Corpus | None = None) -> None:
        self.corpus, self.validation = corpus, validation
        self.duplicates = 0
        self.by_tail = False
        self.count = 0

    def scan(self) -> None:
        """Decide how to split; raises `UserError` when there is no text."""
        found = {"train": 0, "val": 0}
        for split, _ in self.documents():
            found[split] += 1
        self.count = sum(found.values())
        if not self.count or (self.validation is not None and not all(found.values())):
            which = "data.val_paths" if found["train"] else "data.paths"
            skipped = [*self.corpus.skipped, *(self.validation.skipped if self.validation else [])]
            why = f"; skipped: {', '.join(skipped[:3])}" if skipped else ""
            raise UserError(f"{which}: there is no text in the corpus{why}.")
        self.by_tail = self.validation is None and not all(found.values())

    def documents(self) -> Iterator[tuple[str, Document]]:
        """(split, document) in a fixed order; the same at every call."""
        seen: set[bytes] = set()
        self.duplicates = 0
        sources: list[tuple[str | None, Corpus]] = [(None, self.corpus)]
        if self.validation is not None:
            sources = [("val", self.validation), ("train", self.corpus)]
        for fixed, corpus in sources:
            corpus.skipped.clear()
            for document in corpus.documents():
                digest = hashlib.sha256(document.text.encode("utf-8", "surrogateescape")).digest()
                if digest in seen:
                    self.duplicates += 1
                    continue
                seen.add(digest)
                if self.by_tail:
                    yield from _cut(document)
                else:
                    yield fixed or ("val" if held_out(document.name) else "train"), document

    @property
    def skipped(self) -> list[str]:
        return [*self.corpus.skipped, *(self.validation.skipped if self.validation else [])]


def _cut(document: Document) -> Iterator[tuple[str, Document]]:
    text = document.text
    position = int(len(text) * (1 - TAIL))
    newline = text.rfind("\n", 0, position)
    position = newline + 1 if newline > len(text) // 2 else position
    yield "train", Document(document.name, text[:position])
    if text[position:].strip():
        yield "val", Document(document.name, text[position:])


def shard_key(source: Source, tokenizer_key: dict[str, Any]) -> str:
    """A hash of everything that the shards depend on."""
    described = {
        "format": FORMAT,
        "corpus": [type(source.corpus).__name__, vars_of(source.corpus), source.corpus.fingerprint()],
        "validation": None
        if source.validation is None
        else [vars_of(source.validation), source.validation.fingerprint()],
        "tokenizer": tokenizer_key,
    }
    text = json.dumps(described, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def vars_of(corpus: Corpus) -> dict[str, Any]:
    """A corpus' settings."""
    return {name: str(value) for name, value in sorted(vars(corpus).items()) if name not in ("skipped", "option")}


def prepare(source: Source, tokenizer_spec: Any, cache_dir: str | Path) -> tuple[Shards, Tokenizer]:
    """The shards of a corpus and their tokenizer, from the cache or built now.

    Raises `UserError` when there is no text, or the cache cannot be written.
    """
    root = Path(cache_dir).expanduser() / "shards"
    folder = root / shard_key(source, tokenizer_spec.key())
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{folder.name}.lock"):
            if not (folder / HEADER).exists():
                _build(source, tokenizer_spec, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir} cannot be written: {error.strerror or error}.") from error
    shards = read_shards(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.hash != shards.header["tokenizer"]:
        raise UserError(f"the tokenizer in {folder} is not the one of its shards; delete the folder to rebuild.")
    for name in shards.header["skipped"][:5]:
        log.info("Skipped %s.", name)
    if count := shards.header["skipped_count"]:
        log.warning(
            "%d unreadable or unwanted file(s) of the corpus were skipped; %s lists them.", count, folder / HEADER
        )
    return shards, tokenizer


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another run is preparing the same data; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, and so does the death of this process


def _build(source: Source, tokenizer_spec: Any, folder: Path) -> None:
    for stale in folder.parent.glob(f"{folder.name}.building-*"):
        shutil.rmtree(stale, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building-", dir=folder.parent))
    try:
        source.scan()
        log.info("Preparing %d documents: tokenizer, then tokens (once; kept in %s).", source.count, folder)
        tokenizer = tokenizer_spec.build(document.text for split, document in source.documents() if split == "train")
        tokenizer.save(aside / "tokenizer.json")
        dtype = dtype_for(tokenizer.vocab_size)
        writers = {name: SplitWriter(aside, name, dtype) for name in SPLITS}
        with _progress(source.count) as advance:
            for batch in _batches(source.documents()):
                _tokenise(batch, tokenizer, writers)
                advance(len(batch))
        header = {
            "format": FORMAT,
            "dtype": dtype,
            "tokenizer": Tokenizer.load(aside / "tokenizer.json").hash,
            "vocab_size": tokenizer.vocab_size,
            "splits": {name: writer.close() for name, writer in writers.items()},
            "split": "tail of each document" if source.by_tail else "documents",
            "duplicates": source.duplicates,
            "skipped_count": len(source.skipped),
            "skipped": source.skipped[:LISTED_SKIPS],
        }
        if not all(split["tokens"] for split in header["splits"].values()):
            raise UserError("data.paths: there is too little text to train on and to validate with.")
        (aside / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        for file in aside.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        if folder.exists():  # without a header: not of our making, or damaged by hand
            shutil.rmtree(folder)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _batches(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch: list[tuple[str, Document]] = []
    size = 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    """Cut a long text after line breaks that are followed by neither a space nor another break.

    There the tokenizer's splitting pattern cuts as well, so that the pieces' tokens are the whole's.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE_BYTES:
        end = start + PIECE_BYTES
        while (end := text.find("\n", end) + 1) and end < len(text) and text[end].isspace():
            pass
        if not end:
            break
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return [piece for piece in pieces if piece]


def _tokenise(batch: list[tuple[str, Document]], tokenizer: Tokenizer, writers: dict[str, SplitWriter]) -> None:
    pieces = [_pieces(document.text) for _, document in batch]
    encoded = iter(tokenizer.encode_batch([piece for document in pieces for piece in document]))
    for (split, document), parts in zip(batch, pieces, strict=True):
        ids = [tokenizer.eot_id]
        for _ in parts:
            ids.extend(next(encoded))
        writers[split].append(ids, len(document.text.encode("utf-8")))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr if that is a terminal."""
    columns = (TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("tokenising", total=total)
        yield lambda count: bar.advance(task, count)
