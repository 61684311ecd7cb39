"""Reading GGUF files that anyone may have damaged: every count, length and offset is checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UserError
from nanochat.export.packing import BLOCK, BLOCK_BYTES, NUMBERS, gguf_library, unpack

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q2_0", "TQ1_0", "TQ2_0")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file."""

    name: str
    type: str
    """ggml's name, such as TQ2_0"""
    shape: tuple[int, ...]
    """row-major: (rows, cols), the reverse of the order in the file"""
    offset: int
    """bytes from the start of the file"""
    size: int
    """bytes"""


class _Cursor:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a whole GGUF file: {reason}.")

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fail(f"it ends inside {what}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        kind, count = self.number("I", what), self.number("Q", what)
        if kind in _SCALARS:
            item = struct.calcsize("<" + _SCALARS[kind])
            # take() refuses a count that the file cannot hold before any memory is asked for
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self.take(count * item, what)))
        if kind != _STRING:
            raise self.fail(f"{what} is an array of the unknown or nested type {kind}")
        if count * 8 > len(self.data) - self.at:
            raise self.fail(f"it ends inside {what}")
        return [self.text(what) for _ in range(count)]


class GGUFFile:
    """The metadata and tensors of a GGUF file, memory-mapped; a context manager.

    Raises `UserError` for a file that is missing, truncated, of another format, or inconsistent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = "it is empty" if isinstance(error, ValueError) else (error.strerror or str(error))
            raise UserError(f"{path} cannot be read: {reason}.") from error
        self.metadata: dict[str, Any] = {}
        """value of each key; arrays are lists"""
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read(_Cursor(self.path, self._map))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._map.close()

    def _read(self, cursor: _Cursor) -> None:
        if cursor.take(4, "its magic number") != MAGIC:
            raise UserError(f"{self.path} is not a GGUF file: it does not begin with the letters GGUF.")
        self.version = cursor.number("I", "its header")
        if self.version not in VERSIONS:
            raise UserError(f"{self.path} is GGUF version {self.version}; versions 2 and 3 can be read.")
        tensor_count, key_count = cursor.number("Q", "its header"), cursor.number("Q", "its header")
        # the smallest tensor entry takes 24 bytes, the smallest key 13
        if tensor_count * 24 + key_count * 13 > len(self._map):
            raise cursor.fail(f"it claims {tensor_count} tensors and {key_count} keys")
        for index in range(key_count):
            key = cursor.text(f"key {index}")
            if key in self.metadata:
                raise cursor.fail(f"key {key!r} occurs twice")
            self.metadata[key] = cursor.value(cursor.number("I", f"key {key!r}"), f"key {key!r}")
        entries = [self._tensor_entry(cursor, index) for index in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.fail(f"general.alignment {alignment!r} is not a power of two")
        start = -(-cursor.at // alignment) * alignment
        for name, kind, shape, offset in entries:
            self._add_tensor(cursor, name, kind, shape, offset, start, alignment)
        end = start
        for tensor in sorted(self.tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                raise cursor.fail(f"tensor {tensor.name!r} overlaps another one")
            end = tensor.offset + tensor.size

    def _tensor_entry(self, cursor: _Cursor, index: int) -> tuple[str, int, tuple[int, ...], int]:
        what = f"the entry of tensor {index}"
        name = cursor.text(what)
        dimensions = cursor.number("I", what)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q", what) for _ in range(dimensions))[::-1]
        return name, cursor.number("I", what), shape, cursor.number("Q", what)

    def _add_tensor(
        self, cursor: _Cursor, name: str, kind: int, shape: tuple[int, ...], offset: int, start: int, alignment: int
    ) -> None:
        gguf = gguf_library()
        if name in self.tensors:
            raise cursor.fail(f"tensor {name!r} occurs twice")
        if kind == NUMBERS["q2_0"]:
            kind_name, block, block_size = "Q2_0", BLOCK["q2_0"], BLOCK_BYTES["q2_0"]
        else:
            try:
                known = gguf.GGMLQuantizationType(kind)
            except ValueError as error:
                raise cursor.fail(f"tensor {name!r} has the unknown type {kind}") from error
            kind_name, (block, block_size) = known.name, gguf.GGML_QUANT_SIZES[known]
        if min(shape) < 1 or shape[-1] % block:
            raise cursor.fail(f"tensor {name!r} of type {kind_name} cannot have the shape {list(shape)}")
        size = prod(shape) // block * block_size
        if offset % alignment:
            raise cursor.fail(f"tensor {name!r} is not aligned to {alignment} bytes")
        if start + offset + size > len(self._map):
            raise cursor.fail(f"it ends inside tensor {name!r}")
        self.tensors[name] = TensorInfo(name, kind_name, shape, start + offset, size)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A key's value; raises `UserError` when it has another type, or is missing without a default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path} lacks the key {key}.")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{self.path} has a value of the wrong type for the key {key}.")
        return value

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor."""
        tensor = self._tensor(name)
        return self._map[tensor.offset : tensor.offset + tensor.size]

    def array(self, name: str) -> np.ndarray:
        """A tensor's values, de-quantised to float32.

        Raises `UserError` when the file has no such tensor, or its type is not one that nanochat writes.
        """
        tensor = self._tensor(name)
        if tensor.type not in _READABLE:
            raise UserError(f"{self.path}: tensor {name!r} has type {tensor.type}, which cannot be read.")
        data = self.raw(name)
        if tensor.type in ("F32", "F16"):
            kind = "<f4" if tensor.type == "F32" else "<f2"
            return np.frombuffer(data, kind).astype(np.float32).reshape(tensor.shape)
        rows = np.frombuffer(data, np.uint8).reshape(*tensor.shape[:-1], -1)
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale may be infinite
            return unpack(rows, tensor.type.lower()).reshape(tensor.shape)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise UserError(f"{self.path} has no tensor {name!r}.")
        return self.tensors[name]
