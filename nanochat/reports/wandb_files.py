"""Reading the logs of W&B's client: `wandb/run-*/run-ID.wandb`, or `wandb/offline-run-*/` where it was offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = 7
BLOCK = 32768
LAST_CHUNKS = (1, 4)
"""kinds of chunks that end a record: the whole of it, or its last part"""


def records(path: Path) -> Iterator[Any]:
    """The records of one file, protobufs of W&B's; what a kill has cut off is left out.

    The file is a log in LevelDB's format behind a header of 7 bytes: blocks of 32 KiB, in each of them chunks of crc
    (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and data.

    Raises:
        ValueError: it is not such a file.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, place, parts = path.read_bytes(), HEADER, b""
    if not data.startswith(b":W&B"):
        raise ValueError(f"{path} was not written by W&B's client.")
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += 7
        if not 1 <= kind <= 4 or place + length > len(data):
            return
        parts += data[place : place + length]
        place += length
        if kind in LAST_CHUNKS:
            try:
                yield Record.FromString(parts)
            except DecodeError:
                return
            parts = b""


def history(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """The rows of a run below a folder, those of all its sessions; none where a file cannot be read."""
    found = [*folder.glob(f"wandb/run-*/run-{run_id}.wandb"), *folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")]
    for path in sorted(found, key=lambda path: path.parent.name.removeprefix("offline-")):  # by the time of their start
        try:
            for record in records(path):
                if record.WhichOneof("record_type") == "history":
                    yield values(record.history.item)
        except (OSError, ValueError):
            continue


def unsynced(folder: Path, run_id: str) -> list[Path]:
    """The files of a run's offline sessions that `wandb sync` would upload."""
    found = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    return sorted(path for path in found if not _marker(path).exists())


def mark_synced(path: Path) -> None:
    """Keep `wandb sync` from uploading a file; raises `OSError`."""
    _marker(path).touch()


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.synced")


def values(items: Any) -> dict[str, Any]:
    """The keys and values of a row, a summary or a configuration."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
