"""Token shards: the file format in which a tokenized corpus lies on disk.

A folder holds, for each of the splits `train` and `val`:

    {split}.bin             the tokens, flat, little-endian uint16 (vocabularies up to 65,536) or uint32;
                            each document is preceded by the end-of-text token
    {split}.documents.bin   where documents start (the index of that end-of-text token), little-endian int64

and `header.json` (counts, dtype, hashes, what was skipped; with a checksum over itself) and `tokenizer.json`.
Readers map the files into memory; nothing is trusted before its size has been compared with the header.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError

FORMAT = 1
SPLITS = ("train", "val")
HEADER = "header.json"
HEADER_BYTES = 16 << 20
"""a larger header is not ours"""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, eot_id: int) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.tokens, self.bytes = 0, 0
        self._eot = np.array([eot_id], dtype)
        self._starts = array("q")
        self._hash = hashlib.sha256()
        self._file = open(folder / f"{split}.bin", "wb")  # noqa: SIM115 - closed by `close`

    def start_document(self) -> None:
        """Write the separator that precedes a document."""
        self._starts.append(self.tokens)
        self._write(self._eot)

    def write(self, ids: list[int], text_bytes: int) -> None:
        """Append tokens to the document that was started last."""
        self._write(np.array(ids, dtype=self.dtype))
        self.bytes += text_bytes

    def close(self) -> dict[str, Any]:
        """Flush everything to the disk; returns the split's part of the header."""
        _sync(self._file)
        starts = np.frombuffer(self._starts, dtype=np.int64).astype("<i8")
        with open(self.folder / f"{self.split}.documents.bin", "wb") as file:
            file.write(starts.tobytes())
            _sync(file)
        return {
            "tokens": self.tokens,
            "documents": len(starts),
            "bytes": self.bytes,
            "sha256": self._hash.hexdigest(),
        }

    def abandon(self) -> None:
        """Close without a result."""
        self._file.close()

    def _write(self, ids: np.ndarray) -> None:
        data = ids.tobytes()
        self._hash.update(data)
        self._file.write(data)
        self.tokens += len(ids)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_header(folder: Path, header: dict[str, Any]) -> None:
    """The last file of a build."""
    with open(folder / HEADER, "w", encoding="utf-8") as file:
        json.dump({**header, "checksum": _checksum(header)}, file, indent=1, ensure_ascii=True)
        _sync(file)


def _checksum(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Split:
    """One split, mapped into memory."""

    tokens: np.ndarray
    """(tokens,) uint16 or uint32"""
    starts: np.ndarray
    """(documents,) int64: index of each document's end-of-text token"""
    bytes: int
    """UTF-8 bytes of the text"""


@dataclass(frozen=True)
class Shards:
    """A prepared corpus."""

    folder: Path
    header: dict[str, Any]
    train: Split
    val: Split

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        if tokenizer.hash != self.header["tokenizer"]["hash"]:
            raise _damaged(self.folder, "tokenizer.json is another tokenizer than the one that made the tokens")
        return tokenizer

    @cached_property
    def identity(self) -> str:
        """A hash of the tokens themselves and their tokenizer: the same wherever and whenever they were made."""
        parts = [self.header["tokenizer"]["hash"], *(self.header["splits"][split]["sha256"] for split in SPLITS)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def open_shards(folder: Path) -> Shards:
    """Map a prepared corpus into memory.

    Raises:
        UserError: when anything in the folder is not what the header says, or was made by another format.
    """
    header = _read_header(folder)
    try:
        dtype = np.dtype({"<u2": "<u2", "<u4": "<u4"}[header["dtype"]])
        splits = {split: _open_split(folder, split, header["splits"][split], dtype) for split in SPLITS}
        known = isinstance(header["tokenizer"]["hash"], str) and isinstance(header["compression"], dict)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"{HEADER} lacks what it should say, or says it wrongly") from error
    if not known:
        raise _damaged(folder, f"{HEADER} says something wrong")
    return Shards(folder, header, splits["train"], splits["val"])


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        if path.stat().st_size > HEADER_BYTES:
            raise _damaged(folder, f"{HEADER} is too large")
        header = json.loads(path.read_bytes())
    except OSError as error:
        raise _damaged(folder, f"{HEADER} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{HEADER} is no JSON") from error
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise _damaged(folder, f"{HEADER} is not one of nanochat's")
    if header["format"] != FORMAT:
        raise _damaged(folder, f"its format is {header['format']}, this version reads {FORMAT}")
    checksum = header.pop("checksum", None)
    if checksum != _checksum(header):
        raise _damaged(folder, f"{HEADER} does not agree with its checksum")
    return header


def _open_split(folder: Path, split: str, said: dict[str, Any], dtype: np.dtype) -> Split:
    counts = {name: said[name] for name in ("tokens", "documents", "bytes")}
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in counts.values()):
        raise _damaged(folder, f"{HEADER} has a count that is none")
    if not isinstance(said["sha256"], str):
        raise _damaged(folder, f"{HEADER} has a hash that is none")
    tokens = _map(folder / f"{split}.bin", dtype, counts["tokens"])
    starts = _map(folder / f"{split}.documents.bin", np.dtype("<i8"), counts["documents"])
    if len(starts) and not (starts[0] == 0 and 0 <= starts[-1] < len(tokens)):
        raise _damaged(folder, f"{split}.documents.bin points outside of the tokens")
    return Split(tokens, starts, counts["bytes"])


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise _damaged(path.parent, f"{path.name} has {size} bytes, the header says {count * dtype.itemsize}")
        # an empty file cannot be mapped
        return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
    except OSError as error:
        raise _damaged(path.parent, f"{path.name} cannot be read ({error.strerror})") from error


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"the prepared data in {folder} cannot be used: {what}; delete the folder and start again.")
