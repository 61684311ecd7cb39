"""Token shards on disk: flat little-endian integers, one file per split, with a JSON header beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UserError

FORMAT = 1
SPLITS = ("train", "val")
HEADER = "header.json"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass
class SplitWriter:
    """Appends documents to a split's file."""

    folder: Path
    name: str
    dtype: str
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    starts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = (self.folder / f"{self.name}.bin").open("wb")

    def append(self, ids: Iterable[int], size: int) -> None:
        """Add one document's token ids (its end-of-text token included) and its size in bytes of text."""
        array = np.asarray(ids, dtype=DTYPES[self.dtype])
        self._file.write(array.tobytes())
        self.starts.append(self.tokens)
        self.tokens += len(array)
        self.documents += 1
        self.bytes += size

    def close(self) -> dict[str, int]:
        """Finish the file and return the split's part of the header."""
        self._file.close()
        np.save(self.folder / f"{self.name}.starts.npy", np.asarray(self.starts, dtype=np.int64))
        return {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}


@dataclass(frozen=True)
class Shards:
    """The token files of a corpus, memory-mapped.

    train, val: (n,) unsigned token ids; header: as written, see `read_shards`.
    """

    train: np.ndarray
    val: np.ndarray
    header: dict[str, Any]
    folder: Path


def read_shards(folder: Path) -> Shards:
    """Open the shards of a folder.

    Raises `UserError` when the header is missing, broken, of another version, or does not fit the files.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        version, dtype = header["format"], DTYPES[header["dtype"]]
        counts = {name: header["splits"][name]["tokens"] for name in SPLITS}
        _ = header["tokenizer"], header["splits"]["val"]["bytes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"the token shards in {folder} have no readable header; delete the folder to rebuild."
        ) from error
    if version != FORMAT:
        raise UserError(f"the token shards in {folder} are of format {version!r}, not {FORMAT}; delete the folder.")
    arrays = []
    for name, count in counts.items():
        path = folder / f"{name}.bin"
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"the header of the token shards in {folder} is broken; delete the folder to rebuild.")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} is missing; delete the folder to rebuild.") from error
        if size != count * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes, not the {count * dtype.itemsize} of its header; delete the folder to rebuild."
            )
        arrays.append(np.memmap(path, dtype=dtype, mode="r"))
    return Shards(arrays[0], arrays[1], header, folder)
