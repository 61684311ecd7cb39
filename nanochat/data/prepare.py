"""Text -> token shards, built once into a cache folder and reused while nothing has changed.

    scan       one pass over the documents decides each one's split and drops exact duplicates
    tokenizer  trained on the training split
    encode     both splits, in parallel and in bounded memory, into a folder aside, renamed when whole

The folder's name is a hash of the corpus' listing, the tokenizer and the settings.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import lzma
import os
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.data.shards import FORMAT, HEADER, SPLITS, Shards, SplitWriter, open_shards, token_dtype, write_header
from nanochat.data.sources.base import Corpus, Document, Skipped, option_of, origin_of
from nanochat.data.tokenizer import Tokenizer, TokenizerSpec, pieces
from nanochat.errors import UserError

log = logging.getLogger(__name__)

TRAIN, VAL, DROPPED, CUT = 0, 1, 2, 3
VAL_ONE_IN = 20
SHARES = (0.01, 0.20)
"""a share of the text that validates and is outside of these is mended"""
GAP = 4096
"""characters between the parts of a text that is cut: more than a sequence of 1,024 BPE tokens has"""
COMPRESSED_BYTES = 2_000_000
"""how much of the validation text gzip and xz are measured on"""
BATCH_CHARACTERS = 4 << 20
"""text that is encoded at a time: `tokenizers` needs some 100 bytes of memory for each token of it"""


@dataclass
class Plan:
    """Where each document goes.

    Without a validation corpus a document goes to validation when the sha256 of its name is a multiple of 20. Where
    that leaves less than 1% or more than 20% of the text (in characters) to validation, documents that are more than
    5% of the text are cut: their last 5% validate. Where the share is still outside, or nothing is that long, the last
    5% of the whole text validate. A cut is at a line border where one is near, and leaves `GAP` characters out.
    """

    places: list[array] = field(default_factory=list)
    """TRAIN, VAL, DROPPED or CUT for each document of each corpus"""
    border: int | None = None
    """characters of kept text that train, when the text is split by position"""
    duplicates: int = 0
    characters: int = 0
    skipped: Skipped = field(default_factory=Skipped)


def scan(corpus: Corpus, val_corpus: Corpus | None = None) -> Plan:
    """Read everything once and decide.

    Raises:
        UserError: when a corpus has no text.
    """
    plan, seen = Plan(), set()
    found = [0, 0]
    """documents of each split"""
    lengths = array("Q")
    """characters of the training corpus' documents"""

    def place(document: Document, split: int) -> int:
        digest = hashlib.sha256(document.text.encode()).digest()[:16]
        if digest in seen:
            plan.duplicates += 1
            return DROPPED
        seen.add(digest)
        plan.characters += len(document.text)
        found[split] += 1
        return split

    val_places = array("B")
    if val_corpus is not None:  # first, so that of a text in both it is the training copy that is dropped
        val_places.extend(place(document, VAL) for document in val_corpus.documents(plan.skipped))
        if not val_places:
            raise _no_text(val_corpus, plan.skipped)
    places = array("B")
    for document in corpus.documents(plan.skipped):
        places.append(place(document, TRAIN if val_corpus is not None else split_of(document.name)))
        lengths.append(len(document.text))
    if not places:
        raise _no_text(corpus, plan.skipped)
    if not found[TRAIN] and val_corpus is not None:
        raise UserError(f"{option_of(corpus)} has no text that {option_of(val_corpus)} does not have too.")
    plan.places = [places] if val_corpus is None else [places, val_places]
    if val_corpus is None and not _balanced(places, lengths):
        for index, length in enumerate(lengths):
            if places[index] != DROPPED and length * VAL_ONE_IN > plan.characters:
                places[index] = CUT
        if not _balanced(places, lengths):
            plan.border = plan.characters - max(1, plan.characters // VAL_ONE_IN)
    return plan


def _balanced(places: array, lengths: array) -> bool:
    """Whether a plan's share of validation is as it should be."""
    characters = dict.fromkeys((TRAIN, VAL, DROPPED, CUT), 0)
    for split, length in zip(places, lengths, strict=True):
        characters[split] += length
    validate = characters[VAL] + characters[CUT] / VAL_ONE_IN
    least, most = SHARES
    return least <= validate / max(characters[TRAIN] + characters[VAL] + characters[CUT], 1) <= most


def split_of(name: str) -> int:
    """TRAIN or, for one name in twenty, VAL."""
    return VAL if int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()) % VAL_ONE_IN == 0 else TRAIN


def _no_text(corpus: Corpus, skipped: Skipped) -> UserError:
    why = f"; skipped: {skipped}" if skipped.count else ""
    key = getattr(corpus, "text_key", None)
    hint = "" if key is None else f" (data.text_key={key})"
    return UserError(f"{origin_of(corpus)} has no text to use{hint}{why}.")


def split_documents(corpora: list[Corpus], plan: Plan) -> Iterator[tuple[int, str]]:
    """(TRAIN or VAL, text) of every kept document, in order."""
    position = 0
    for corpus, places in zip(corpora, plan.places, strict=True):
        count = 0
        for count, document in enumerate(corpus.documents(), 1):
            if count > len(places):
                raise _changed(corpus)
            if places[count - 1] == DROPPED:
                continue
            text = document.text
            if plan.border is not None:
                cut = plan.border - position
                position += len(text)
            elif places[count - 1] == CUT:
                cut = len(text) - max(1, len(text) // VAL_ONE_IN)
            else:
                yield places[count - 1], text
                continue
            yield from _parts(text, cut)
        if count != len(places):
            raise _changed(corpus)


def _parts(text: str, cut: int) -> Iterator[tuple[int, str]]:
    """(TRAIN, what comes before a cut), (VAL, what comes after it and the gap), those of them that are not empty."""
    if cut >= len(text):
        yield TRAIN, text
    elif cut <= 0:
        yield VAL, text
    else:
        cut = _at_line(text, cut, text.rfind("\n", 0, cut) + 1 or text.find("\n", cut) + 1)
        start = cut + min(GAP, (len(text) - cut) // 5)
        yield TRAIN, text[:cut]
        yield VAL, text[_at_line(text, start, text.find("\n", start) + 1) :]


def _at_line(text: str, place: int, line: int) -> int:
    """`line`, the beginning of one, where it is within a hundredth of the text of `place`; else `place`."""
    return line if 0 < line < len(text) and abs(line - place) <= len(text) // 100 else place


def _changed(corpus: Corpus) -> UserError:
    return UserError(f"{option_of(corpus)} changed while it was read; start again when nothing writes to it.")


def prepare(
    corpus: Corpus,
    tokenizer: TokenizerSpec | Tokenizer,
    cache_dir: str | Path,
    val_corpus: Corpus | None = None,
) -> Shards:
    """The shards of a corpus: from the cache, or built now.

    Args:
        corpus: the text; a twentieth of its documents validates unless `val_corpus` is given.
        tokenizer: a specification (trained on the training split where it is trained), or a tokenizer.
        cache_dir: where prepared data is kept.

    Raises:
        UserError: no text, a damaged cache, a folder that cannot be written.
    """
    corpora = [corpus] if val_corpus is None else [corpus, val_corpus]
    root = Path(os.path.expanduser(cache_dir)) / "data"
    prints = [c.fingerprint() for c in corpora]
    folder = root / f"{corpus.kind}-{_key(prints, tokenizer)}"
    try:
        if _is_lopsided(folder):  # of the version before, which mended no shares
            folder = root / f"{corpus.kind}-{_key(prints, tokenizer, mended=True)}"
        if not (folder / HEADER).exists():
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{folder.name}.lock"):
                if not (folder / HEADER).exists():
                    _build(corpora, prints, tokenizer, folder)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir} cannot be used: {error.strerror or error}.") from error
    return open_shards(folder)


def _key(prints: list[dict[str, Any]], tokenizer: TokenizerSpec | Tokenizer, mended: bool = False) -> str:
    identity = tokenizer.hash if isinstance(tokenizer, Tokenizer) else tokenizer.identity()
    parts = [FORMAT, prints, identity, *(["mended"] if mended else [])]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_lopsided(folder: Path) -> bool:
    """Whether a folder holds data whose share of validation was never looked at, and is not as it should be."""
    if not (folder / HEADER).exists():
        return False
    header = open_shards(folder).header
    least, most = SHARES
    return "share" not in header and header["split"] == "name" and not least <= share_of(header) <= most


def share_of(header: dict[str, Any]) -> float:
    """The share of a prepared text's bytes that validates."""
    train, val = (header["splits"][split]["bytes"] for split in SPLITS)
    return val / max(train + val, 1)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system drops it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks here: the rename alone must do
        yield
        return
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Another process prepares the same data; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("No lock on %s (%s).", path, error)
        yield


def _build(
    corpora: list[Corpus], prints: list[dict[str, Any]], tokenizer: TokenizerSpec | Tokenizer, folder: Path
) -> None:
    """Make `folder`, whole or not at all; the caller holds its lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    aside = folder.parent / f".{folder.name}.{os.getpid()}"
    aside.mkdir()
    pool, spec = ThreadPoolExecutor(2), tokenizer
    try:
        log.info("Preparing the %s corpus in %s.", corpora[0].kind, folder)
        plan = scan(corpora[0], corpora[1] if len(corpora) > 1 else None)
        if plan.skipped.count:
            log.warning("Skipped %d of the corpus: %s.", plan.skipped.count, plan.skipped)
        sample = _validation_sample(split_documents(corpora, plan))
        compression = {name: pool.submit(function, sample) for name, function in COMPRESSORS.items()}
        if not isinstance(tokenizer, Tokenizer):
            tokenizer = tokenizer.build(text for split, text in split_documents(corpora, plan) if split == TRAIN)
        tokenizer.save(aside / "tokenizer.json")
        counts = _encode(corpora, plan, tokenizer, aside)
        if [corpus.fingerprint() for corpus in corpora] != prints:
            raise _changed(corpora[0])
        write_header(aside, _header(corpora, plan, tokenizer, counts, compression, len(sample)))
        if folder.is_symlink():  # to a folder that was deleted
            folder.unlink()
        elif folder.exists():  # without a header: not one of ours, or half deleted
            shutil.rmtree(folder)
        os.rename(aside, folder)
        mended = folder.name != f"{corpora[0].kind}-{_key(prints, spec)}"
        _link(folder, corpora[0].kind, _key(prints, tokenizer, mended))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(aside, ignore_errors=True)


def _link(folder: Path, kind: str, key: str) -> None:
    """Let who comes with the finished tokenizer find the same folder."""
    name = folder.parent / f"{kind}-{key}"
    with contextlib.suppress(OSError):
        if name != folder:
            name.symlink_to(folder.name)


def _header(
    corpora: list[Corpus],
    plan: Plan,
    tokenizer: Tokenizer,
    counts: list[dict[str, Any]],
    compression: dict[str, Future[float]],
    sample_bytes: int,
) -> dict[str, Any]:
    cut = any(CUT in places for places in plan.places)
    header = {
        "format": FORMAT,
        "corpus": corpora[0].kind,
        "split": "position" if plan.border is not None else "cut" if cut else "name" if len(corpora) == 1 else "paths",
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash},
        "splits": dict(zip(SPLITS, counts, strict=True)),
        "duplicates": plan.duplicates,
        "skipped": {"count": plan.skipped.count, "empty": plan.skipped.empty, "named": plan.skipped.named},
        "compression": {
            "bytes": sample_bytes,
            "bits_per_byte": {name: future.result() for name, future in compression.items()},
        },
    }
    return {**header, "share": round(share_of(header), 4)}


# ---- compression ----------------------------------------------------------------------------------------------------


def gzip_bits_per_byte(data: bytes) -> float:
    """What `gzip -9` needs for each byte of `data`."""
    return 8 * len(gzip.compress(data, 9, mtime=0)) / max(len(data), 1)


def xz_bits_per_byte(data: bytes) -> float:
    """What `xz -9e` needs for each byte of `data`."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / max(len(data), 1)


COMPRESSORS = {"gzip -9": gzip_bits_per_byte, "xz -9e": xz_bits_per_byte}


def compression_of(data: bytes) -> dict[str, float]:
    """Bits per byte of `data`'s beginning (2 MB), by compressor."""
    return {name: function(data[:COMPRESSED_BYTES]) for name, function in COMPRESSORS.items()}


def _validation_sample(documents: Iterable[tuple[int, str]]) -> bytes:
    parts, size = [], 0
    for split, text in documents:
        if split == VAL:
            parts.append(text[:COMPRESSED_BYTES].encode())
            size += len(parts[-1])
            if size >= COMPRESSED_BYTES:
                break
    return b"\n".join(parts)[:COMPRESSED_BYTES]


# ---- encoding -------------------------------------------------------------------------------------------------------


def _encode(corpora: list[Corpus], plan: Plan, tokenizer: Tokenizer, folder: Path) -> list[dict[str, Any]]:
    """Write both splits; returns their parts of the header."""
    dtype = token_dtype(tokenizer.vocab_size)
    writers = [SplitWriter(folder, split, dtype, tokenizer.eot_id) for split in SPLITS]
    batch: list[tuple[int, bool, str]] = []  # split, whether a document starts here, text
    waiting = 0
    try:
        with _progress(plan.characters) as advance:

            def flush() -> None:
                nonlocal waiting
                for (split, starts, text), ids in zip(
                    batch, tokenizer.encode_batch([text for _, _, text in batch]), strict=True
                ):
                    if starts:
                        writers[split].start_document()
                    writers[split].write(ids, len(text.encode()))
                advance(waiting)
                batch.clear()
                waiting = 0

            for split, text in split_documents(corpora, plan):
                for number, piece in enumerate(pieces(text)):
                    batch.append((split, number == 0, piece))
                    waiting += len(piece)
                    if waiting >= BATCH_CHARACTERS:
                        flush()
            flush()
        return [writer.close() for writer in writers]
    finally:
        for writer in writers:
            writer.abandon()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on a terminal's stderr, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda characters: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tokenizing", total=total)
        yield lambda characters: progress.advance(task, characters)
