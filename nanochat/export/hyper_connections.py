"""The `.mhc` sidecar: the static maps of hyper-connections, one record a sub-layer.

All numbers are little-endian.

| offset | type | meaning |
|---|---|---|
| 0 | u32 | magic 0x6D484321 |
| 4 | u32 | version, 1 or 2 (same layout) |
| 8 | u32 | number of records: two for each block, attention before feed-forward |
| 12 | u32 | streams, 2 or 4 |
| 16 | f32 | records |

A record of 2 streams is 9 numbers: alpha_logit, pre_logits[2], pre_bias[2], post_logits[2], post_bias[2]; of
4 streams 40: res_logits[24] (permutations in lexicographic order), then the same four with [4]. Then
res = alpha I + (1 - alpha) swap with alpha = sigmoid(alpha_logit), or the softmax of res_logits over the permutation
matrices; pre = sigmoid(pre_logits + pre_bias); post = 2 sigmoid(post_logits + post_bias).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.errors import UserError
from nanochat.files import atomic_write
from nanochat.model.gpt import GPT
from nanochat.model.hyper_connections import HyperConnection

MAGIC = 0x6D484321
VERSIONS = (1, 2)
MIXING = {2: 1, 4: 24}
"""logits of the mixing matrix, by streams"""
_HEADER = struct.Struct("<4I")
_MAX_RECORDS = 10_000


@dataclass(frozen=True)
class Record:
    """The static maps of one sub-layer, as logits."""

    res: np.ndarray
    """(1,) for 2 streams: the identity's logit against the swap's; (24,) for 4"""
    pre: np.ndarray
    """(streams,)"""
    post: np.ndarray
    """(streams,)"""


def records_of(gpt: GPT) -> list[Record]:
    """The maps of a network, attention before feed-forward, block by block.

    Raises `UserError` when it has no hyper-connections, or dynamic ones, which the format cannot hold.
    """
    modules = [module for module in gpt.modules() if isinstance(module, HyperConnection)]
    if not modules:
        raise UserError("a .mhc file holds residual streams, and this network has one (mhc.streams=1).")
    if any(module.phi is not None for module in modules):
        raise UserError("a .mhc file holds static maps only, and this network has mhc.maps=dynamic.")
    records = []
    for module in modules:
        res, pre, post = (p.detach().cpu().float().numpy() for p in (module.res, module.pre, module.post))
        if module.streams == 2:
            res = res[:1] - res[1:]  # softmax of two logits is the sigmoid of their difference
        records.append(Record(res, pre, post))
    return records


def write_mhc(path: str | Path, records: Sequence[Record], streams: int, version: int = 2) -> int:
    """Write a sidecar aside and rename it; returns its size in bytes.

    The sum of logits and bias is what counts: everything is written as logits, with a bias of zero.

    Raises `UserError` for values that are not finite, other sizes, or a folder that cannot be written.
    """
    path = Path(path)
    if version not in VERSIONS or streams not in MIXING:
        raise UserError(f"a .mhc file has version 1 or 2 and 2 or 4 streams, not version {version} and {streams}.")
    zero = np.zeros(streams, np.float32)
    parts = [_HEADER.pack(MAGIC, version, len(records), streams)]
    for index, record in enumerate(records):
        if record.res.shape != (MIXING[streams],) or record.pre.shape != zero.shape or record.post.shape != zero.shape:
            raise UserError(f"{path}: record {index} does not have the sizes of {streams} streams.")
        row = np.concatenate((record.res, record.pre, zero, record.post, zero)).astype("<f4")
        if not np.isfinite(row).all():
            raise UserError(f"{path}: record {index} is not finite.")
        parts.append(row.tobytes())
    data = b"".join(parts)
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    return len(data)


def read_mhc(path: str | Path) -> tuple[int, list[Record]]:
    """Read a sidecar: the number of streams, and the records.

    Raises `UserError` for a file that is missing, of another format, truncated, too long, or not finite.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _HEADER.size + _MAX_RECORDS * 4 * (MIXING[4] + 16):
            raise UserError(f"{path} is too long for a .mhc file: {size} bytes.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) < _HEADER.size:
        raise UserError(f"{path} is too short for a .mhc file: {len(data)} bytes.")
    magic, version, count, streams = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise UserError(f"{path} is not a .mhc file: it begins with {magic:#010x} instead of {MAGIC:#010x}.")
    if version not in VERSIONS:
        raise UserError(f"{path} is of version {version}; versions 1 and 2 can be read.")
    if streams not in MIXING:
        raise UserError(f"{path} claims {streams} streams; 2 and 4 can be read.")
    width = MIXING[streams] + 4 * streams
    if count > _MAX_RECORDS or len(data) != _HEADER.size + 4 * width * count:
        raise UserError(
            f"{path} claims {count} records of {4 * width} bytes, and has {len(data) - _HEADER.size} bytes of them."
        )
    rows = np.frombuffer(data, "<f4", offset=_HEADER.size).astype(np.float32).reshape(count, width)
    if not np.isfinite(rows).all():
        raise UserError(f"{path} has values that are not finite.")
    mixing = MIXING[streams]
    res, pre, pre_bias, post, post_bias = np.split(rows, [mixing + k * streams for k in range(4)], axis=1)
    return streams, [Record(*record) for record in zip(res, pre + pre_bias, post + post_bias, strict=True)]
